#!/usr/bin/env bash
# Write what an image contains, as SPDX JSON: devtools/image/write_sbom.sh IMAGE FILE. Needs docker and syft (SYFT=path).
#
# The image's files are unpacked first: syft refuses an archive whose layer exceeds 2 GB, and vLLM's do.
set -euo pipefail

image=${1:?image} file=${2:?SPDX JSON file to write}
command -v "${SYFT:=syft}" >/dev/null || {
    echo "write_sbom: no ${SYFT}; install syft, or name it with SYFT=path" >&2
    exit 1
}
root=$(mktemp -d "${TMPDIR:-/var/tmp}/sbom.XXXXXX")
container=$(docker create "$image")
trap 'docker rm -f "$container" >/dev/null; chmod -R u+w "$root"; rm -rf "$root"' EXIT
docker export "$container" | tar -x --no-same-owner --exclude 'dev/*' -C "$root"
SYFT_CHECK_FOR_APP_UPDATE=false "$SYFT" scan "dir:$root" --source-name "$image" --output "spdx-json=$file"
echo "$file: $(grep -o '"SPDXID": *"SPDXRef-Package' "$file" | wc -l) packages"
