# The images: `make build` (this machine's architecture), `docker buildx bake release` (amd64 and arm64).
# `make build` sets the variables: base images from versions.env, the rest from devtools/image/arguments.py.

variable "VLLM_IMAGE" { default = "vllm/vllm-openai:v0.32.0" }
variable "VLLM_CPU_IMAGE" { default = "vllm/vllm-openai-cpu:v0.32.0" }
variable "IMAGE" { default = "vllm-cutedsl-nvfp4" }
variable "VLLM_VERSION" { default = "unknown" }
variable "PATCHES_SHA256" { default = "unknown" }
variable "GIT_REVISION" { default = "unknown" }
variable "KERNEL_ARCHITECTURES" { default = "sm_90a" }
variable "SOURCE_DATE_EPOCH" { default = "0" }

group "default" { targets = ["gpu", "cpu"] }
group "release" { targets = ["gpu-release", "cpu-release"] }

target "image" {
  context = "."
  args = {
    VLLM_VERSION      = VLLM_VERSION
    PATCHES_SHA256    = PATCHES_SHA256
    GIT_REVISION      = GIT_REVISION
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH
  }
  # attestations carry the time of the build: they would differ each time
  attest = ["type=provenance,disabled=true"]
}

target "gpu" {
  inherits = ["image"]
  args     = { BASE_IMAGE = VLLM_IMAGE, KERNEL_ARCHITECTURES = KERNEL_ARCHITECTURES }
  tags     = ["${IMAGE}:gpu"]
}

target "cpu" {
  inherits = ["image"]
  args     = { BASE_IMAGE = VLLM_CPU_IMAGE }
  tags     = ["${IMAGE}:cpu"]
}

# arm64 is built and never run by this project's CI
target "gpu-release" {
  inherits  = ["gpu"]
  platforms = ["linux/amd64", "linux/arm64"]
}

target "cpu-release" {
  inherits  = ["cpu"]
  platforms = ["linux/amd64", "linux/arm64"]
}
