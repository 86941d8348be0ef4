"""Chat as DeepSeek-V4 means it, without a flag: parsers, thinking and effort follow from the checkpoint's config.json.

The API server's `fill_in_chat_arguments` runs before the engine starts. A flag that the user gives wins; another
model's flags stay as they are.
"""

import argparse
import copy
import logging
from collections.abc import Mapping
from typing import Any

from .. import settings
from ..checkpoint import draft
from ..settings import Thinking

logger = logging.getLogger(__name__)

# class name in config.json -> vLLM's parsers, of tools and of reasoning by the same name
PARSERS = {
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "DeepseekV4ForConditionalGeneration": "deepseek_v4",
    "DeepseekV41ForCausalLM": "deepseek_v41",
}
NONE = "none"  # as a parser's name: parse nothing

EFFORT_TABLE = "effort_table"  # a chat template argument of ours
# vLLM's tokenizer writes the texts that the releases of 0731 and 0813 were trained with. The preview's checkpoints
# know two efforts: "high" is no text at all, and "max" is the text that became the releases' "high".
PREVIEW_EFFORTS = {"low": "low", "high": "low", "max": "high"}


def rendered_effort(effort: str | None, template_arguments: Mapping[str, Any]) -> str | None:
    """The effort whose text vLLM's tokenizer should write for `effort`: another one for the preview's weights."""
    if template_arguments.get(EFFORT_TABLE) != draft.PREVIEW or effort is None:
        return effort
    return PREVIEW_EFFORTS[effort]


def thinking_arguments(thinking: Thinking, preview: bool) -> dict[str, Any]:
    """Chat template arguments of requests that say nothing: {} is thinking, at effort "high".

    `thinking: true` is never written: vLLM's tokenizer would no longer hear a request's `enable_thinking: false`.
    """
    arguments: dict[str, Any] = {EFFORT_TABLE: draft.PREVIEW} if preview else {}
    if thinking is Thinking.OFF:
        arguments["thinking"] = False
    elif thinking is not Thinking.ON:
        arguments["reasoning_effort"] = thinking.value
    return arguments


def _config_of(args: argparse.Namespace) -> tuple[Mapping[str, Any], str | None]:
    """(config.json, text of the checkpoint's own chat encoder or None) of the model that `vllm serve` was given.

    {} where config.json cannot be read alone.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_bytes, get_hf_file_to_dict
    from vllm.transformers_utils.utils import is_cloud_storage

    source = args.hf_config_path or args.model
    if is_cloud_storage(source):
        logger.warning(
            "chat: %s is not on this disk; parsers and thinking are not set by the model. Name them: "
            "--tool-call-parser, --enable-auto-tool-choice, --reasoning-parser, --default-chat-template-kwargs",
            source,
        )
        return {}, None
    try:
        config = get_hf_file_to_dict("config.json", source, args.revision)
    except ValueError:  # no JSON: vLLM reads the same file next, and says so
        return {}, None
    if not isinstance(config, dict):
        return {}, None
    encoder = get_hf_file_bytes(draft.ENCODER, source, args.revision) if _parser(config) else None
    return config, encoder.decode("utf-8", "replace") if encoder else None


def _parser(config: Mapping[str, Any]) -> str | None:
    """The parsers of config.json's class, None for another model's."""
    return next((PARSERS[name] for name in config.get("architectures") or () if name in PARSERS), None)


def _check_parser(flag: str, name: str | None, registered: list[str]) -> None:
    if name and name not in registered:
        raise ValueError(
            f"{flag} {name}: there is no such parser; use {NONE}, or one of: {', '.join(sorted(registered))}"
        )


def fill_in_chat_arguments(args: argparse.Namespace) -> None:
    """Set in `args` of `vllm serve` what the user left open, by the model's class.

    Raises ValueError for a parser that vLLM does not have, and for a default of thinking where the model's class has
    no such thing; both before a weight is read.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    config, encoder = _config_of(args)
    parser = _parser(config)

    if args.tool_call_parser is None and parser:
        args.tool_call_parser, args.enable_auto_tool_choice = parser, True
    elif args.tool_call_parser == NONE:
        args.tool_call_parser, args.enable_auto_tool_choice = None, False
    # a copy: it may be the argument parser's default
    args.structured_outputs_config = copy.copy(args.structured_outputs_config)
    reasoning = args.reasoning_parser or args.structured_outputs_config.reasoning_parser or parser or NONE
    args.reasoning_parser = args.structured_outputs_config.reasoning_parser = (
        "" if reasoning == NONE else reasoning
    )
    _check_parser("--tool-call-parser", args.tool_call_parser, ToolParserManager.list_registered())
    _check_parser("--reasoning-parser", args.reasoning_parser, ReasoningParserManager.list_registered())

    thinking = settings.thinking()
    if parser:
        ours = thinking_arguments(thinking, draft.release(draft.draft_head(config), encoder) == draft.PREVIEW)
        args.default_chat_template_kwargs = ours | (args.default_chat_template_kwargs or {})
    elif thinking is not Thinking.ON:
        named = (config.get("architectures") or ["the model"])[0]
        raise ValueError(
            f"{settings.THINKING}={thinking}: {named} is no DeepSeek-V4; unset it, and give this model's own "
            f"arguments by --default-chat-template-kwargs"
        )
    logger.info(
        "chat: tool parser %s, reasoning parser %s, template arguments %s",
        args.tool_call_parser or NONE,
        args.reasoning_parser or NONE,
        args.default_chat_template_kwargs or {},
    )
