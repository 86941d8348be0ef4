"""checkpoint/draft.py: which draft head there is, what it is stored as, and which release that means."""

from types import SimpleNamespace

import pytest

from cutedsl_nvfp4.checkpoint.draft import PREVIEW, RELEASE, DraftHead, draft_head, release
from tests.support.checkpoints import headers
from tests.support.checkpoints.headers import DSPARK_FIELDS, MTP_FIELDS

TRUNK = {"num_hidden_layers": 3}


def found(fields: dict, tensors: headers.Headers | None):
    if tensors is not None:
        tensors = {name: SimpleNamespace(dtype=dtype) for name, (dtype, _) in tensors.items()}
    return draft_head(TRUNK | fields, tensors)


@pytest.mark.parametrize(
    "fields, expected",
    [
        (MTP_FIELDS, DraftHead("MTP", 1)),
        (DSPARK_FIELDS, DraftHead("DSpark", 3, 5)),
        (DSPARK_FIELDS | {"n_mtp_layers": 2, "dspark_block_size": None}, DraftHead("DSpark", 2)),
        ({"num_nextn_predict_layers": 0}, None),
        ({"num_nextn_predict_layers": "1"}, None),
        ({}, None),
    ],
)
def test_config_alone(fields, expected):
    assert found(fields, None) == expected


@pytest.mark.parametrize("fields", [MTP_FIELDS, DSPARK_FIELDS, {}])
def test_tensors_decide(fields):
    """Exporters drop a head and leave its fields, or lose the fields."""
    assert found(fields, headers.demo()) is None
    mtp, dspark = found(fields, headers.mtp("bf16", "bf16")), found(fields, headers.dspark("bf16", "bf16"))
    assert (mtp.kind, mtp.layers, mtp.block_size) == ("MTP", 1, None)
    assert (dspark.kind, dspark.layers) == ("DSpark", 3)
    assert dspark.block_size == (5 if fields is DSPARK_FIELDS else None)


@pytest.mark.parametrize("fields, kind", [(MTP_FIELDS, "MTP"), (DSPARK_FIELDS, "DSpark"), ({}, "MTP")])
def test_config_decides_where_the_tensors_do_not_show(fields, kind):
    linears = {name: tensor for name, tensor in headers.mtp("fp8", "mxfp4").items() if ".attn.w" in name}
    assert found(fields, linears).kind == kind


@pytest.mark.parametrize("prefix", ["mtp.0", "model.mtp.0", "layers.3", "model.layers.3"])
def test_a_head_by_other_names(prefix):
    head = found(MTP_FIELDS, headers.demo() | headers.mtp("fp8", "mxfp4", prefix))
    assert (head.kind, head.layers, head.stored(False), head.stored(True)) == ("MTP", 1, ("fp8",), ("mxfp4",))


@pytest.mark.parametrize(
    "linears, experts, stored",
    [
        ("fp8", "mxfp4", (("fp8",), ("mxfp4",))),
        ("nvfp4", "nvfp4", (("nvfp4",), ("nvfp4",))),
        ("nvfp4-packed", "nvfp4-packed", (("nvfp4",), ("nvfp4",))),
        ("bf16", "nvfp4", (("bf16",), ("nvfp4",))),
    ],
)
def test_what_it_is_stored_as(linears, experts, stored):
    for head in (headers.mtp(linears, experts), headers.dspark(linears, experts)):
        head = found({}, headers.demo() | head)
        assert (head.stored(experts=False), head.stored(experts=True)) == stored
        assert ("0.main_proj" in head.formats) is (head.kind == "DSpark")
        assert not any("gate" in linear or "markov" in linear for linear in head.formats)


def test_mixed_experts_are_told():
    tensors = headers.mtp("fp8", "mxfp4") | headers.linear("mtp.0.ffn.experts.1.w1", 64, 256, "bf16")
    assert found({}, tensors).stored(experts=True) == ("bf16", "mxfp4")


ENCODERS = {
    PREVIEW: 'REASONING_EFFORT_MAX = "…"\n',
    RELEASE: 'REASONING_EFFORT_PROMPTS = {"low": "", "high": "…", "max": "…"}\nDEFAULT_REASONING_EFFORT = "low"\n',
}


def test_release_follows_from_the_encoder_and_else_from_mtp():
    mtp, dspark = DraftHead("MTP", 1), DraftHead("DSpark", 3, 5)
    for head in (mtp, dspark, None):
        for expected, source in ENCODERS.items():
            assert release(head, source) == expected
    for source in (None, "", "def encode_messages(): ..."):
        assert release(mtp, source) == PREVIEW
        # a release, or a preview with DSpark attached
        assert release(dspark, source) is None and release(None, source) is None
