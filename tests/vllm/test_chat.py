"""Chat without a flag: what follows from the model's class, what the user's flags keep, what is refused."""

import json
from argparse import Namespace

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cutedsl_nvfp4.checkpoint.draft import PREVIEW
from cutedsl_nvfp4.settings import THINKING
from cutedsl_nvfp4.vllm.chat import PARSERS, fill_in_chat_arguments
from tests.support.paths import DEMO


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


@pytest.fixture
def filled(parser, tmp_path):
    """(config.json's content, flags) -> the arguments of the API server."""

    def fill(config: dict, *flags: str) -> Namespace:
        (tmp_path / "config.json").write_text(json.dumps(config))
        args = parser.parse_args(["--model", str(tmp_path), *flags])
        fill_in_chat_arguments(args)
        return args

    return fill


def parsers(args: Namespace) -> tuple:
    return args.tool_call_parser, args.enable_auto_tool_choice, args.reasoning_parser


DEEPSEEK = {"architectures": ["DeepseekV4ForCausalLM"]}
OTHER = {"architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize("name", PARSERS)
def test_deepseek_parses_tools_and_reasoning(filled, name):
    assert parsers(filled({"architectures": [name]})) == (PARSERS[name], True, PARSERS[name])


def test_every_deepseek_class_of_vllm_has_parsers():
    """A class that a new vLLM brings fails here until its parsers are known."""
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS, _TEXT_GENERATION_MODELS

    classes = {
        name
        for name, (module, _) in (_TEXT_GENERATION_MODELS | _MULTIMODAL_MODELS).items()
        if "deepseek_v4" in module
    }
    assert classes == set(PARSERS)


@pytest.mark.parametrize("config", [OTHER, {}, {"architectures": None}])
def test_another_model_is_left_alone(filled, parser, config, tmp_path):
    flags = "--tool-call-parser", "hermes", "--enable-auto-tool-choice", "--reasoning-parser", "qwen3"
    assert parsers(filled(config)) == (None, False, "")
    assert filled(config).default_chat_template_kwargs is None
    assert parsers(filled(config, *flags)) == ("hermes", True, "qwen3")


def test_the_users_flags_win(filled):
    args = filled(DEEPSEEK, "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    assert parsers(args) == ("hermes", False, "qwen3")
    args = filled(DEEPSEEK, "--structured-outputs-config", '{"reasoning_parser": "qwen3"}')
    assert args.reasoning_parser == "qwen3"
    args = filled(DEEPSEEK, "--default-chat-template-kwargs", '{"thinking": false}')
    assert args.default_chat_template_kwargs == {"thinking": False}


@pytest.mark.parametrize("config", [DEEPSEEK, OTHER])
def test_none_switches_a_parser_off(filled, config):
    flags = "--tool-call-parser", "none", "--enable-auto-tool-choice", "--reasoning-parser", "none"
    args = filled(config, *flags)
    assert parsers(args) == (None, False, "") and args.structured_outputs_config.reasoning_parser == ""


@pytest.mark.parametrize("flag", ["--tool-call-parser", "--reasoning-parser"])
@pytest.mark.parametrize("config", [DEEPSEEK, OTHER])
def test_a_parser_that_does_not_exist_is_refused(filled, config, flag):
    with pytest.raises(
        ValueError, match=f"{flag} deepseek_v5: there is no such parser; use none, or one of: .*hermes|qwen3"
    ):
        filled(config, flag, "deepseek_v5")


@pytest.mark.parametrize(
    "value, arguments",
    [
        ("on", {}),
        ("off", {"thinking": False}),
        ("low", {"reasoning_effort": "low"}),
        ("high", {"reasoning_effort": "high"}),
        ("max", {"reasoning_effort": "max"}),
    ],
)
def test_default_of_thinking(filled, monkeypatch, value, arguments):
    monkeypatch.setenv(THINKING, value)
    assert filled(DEEPSEEK).default_chat_template_kwargs == arguments
    preview = filled(DEEPSEEK | {"num_nextn_predict_layers": 1})
    assert preview.default_chat_template_kwargs == arguments | {"effort_table": PREVIEW}
    release = filled(DEEPSEEK | {"num_nextn_predict_layers": 3, "dspark_block_size": 5})
    assert release.default_chat_template_kwargs == arguments


@pytest.mark.parametrize("head", [{"num_nextn_predict_layers": 1}, {"dspark_block_size": 5}])
@pytest.mark.parametrize(
    "encoder, table",
    [("REASONING_EFFORT_MAX = ''", {"effort_table": PREVIEW}), ("REASONING_EFFORT_PROMPTS = {}", {})],
)
def test_the_checkpoints_own_encoder_tells_preview_from_release(filled, tmp_path, head, encoder, table):
    """A preview may have DSpark attached to it: its config.json looks like a release's."""
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding/encoding_dsv4.py").write_text(encoder)
    assert filled(DEEPSEEK | head).default_chat_template_kwargs == table


def test_default_of_thinking_is_refused_for_another_model(filled, monkeypatch):
    monkeypatch.setenv(THINKING, "off")
    with pytest.raises(ValueError, match="CUTEDSL_NVFP4_THINKING=off: Qwen3ForCausalLM is no DeepSeek-V4"):
        filled(OTHER)


def test_a_model_in_the_cloud_is_not_asked(parser, caplog):
    args = parser.parse_args(["--model", "s3://bucket/model"])
    fill_in_chat_arguments(args)
    assert parsers(args) == (None, False, "") and "is not on this disk" in caplog.text


def test_a_damaged_config_is_left_to_vllm(parser, tmp_path):
    (tmp_path / "config.json").write_text("{")
    fill_in_chat_arguments(parser.parse_args(["--model", str(tmp_path)]))


def test_the_demo_needs_no_flag(parser):
    args = parser.parse_args(["--model", str(DEMO)])
    fill_in_chat_arguments(args)
    assert parsers(args) == ("deepseek_v4", True, "deepseek_v4")
    assert args.default_chat_template_kwargs == {}
