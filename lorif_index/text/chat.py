"""Chat: conversations, and prompts with completions, as tokens of which only the answer's have a loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..capture.losses import IGNORE
from ..errors import DataError

# A template that says itself which parts the model wrote.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Tokens = tuple[list[int], list[int]]
"""Token ids, and labels: the ids where there is a loss, else -100."""


def is_chat(value: Any) -> bool:
    """Whether it is a conversation: a list of messages {"role", "content"}."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0
    return listed and all(isinstance(message, Mapping) and "role" in message for message in value)


def chat_tokens(messages: Any, tokenizer: Any) -> Tokens:
    """A conversation under the tokenizer's chat template; only what the assistant says has a loss.

    Where the template marks the assistant's parts ({% generation %}), these; else what each assistant's message adds to
    the rendering of those before it with the header of an answer.

    Raises:
        DataError: no conversation, no template, a template that a message's place cannot be told from.
    """
    if not is_chat(messages):
        raise DataError(f'a conversation must be a list of messages {{"role", "content"}}, got {messages!r:.80}')
    if _GENERATION.search(_template(tokenizer)):
        found = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
        return ids, [token if own else IGNORE for token, own in zip(ids, mask, strict=True)]
    learnt = [(n, n + 1) for n, message in enumerate(messages) if message["role"] == "assistant"]
    return _part_of_chat(messages, learnt, tokenizer)


def completion_tokens(prompt: Any, completion: Any, tokenizer: Any) -> Tokens:
    """A prompt with its completion, both texts or both conversations; only the completion has a loss.

    Texts are tokenised together, with the special tokens that the tokenizer adds; a token that reaches over the border
    belongs to the completion.

    Raises:
        DataError: of other types, or as `chat_tokens` does.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return _labelled(prompt + completion, [(len(prompt), len(prompt + completion))], tokenizer, special=True)
    if not is_chat(prompt) or not is_chat(completion):
        raise DataError(
            "prompt and completion must both be texts or both be lists of messages, got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    whole = [*prompt, *completion]
    return _part_of_chat(whole, [(len(prompt), len(whole))], tokenizer)


def _part_of_chat(messages: Any, learnt: list[tuple[int, int]], tokenizer: Any) -> Tokens:
    """A conversation of which some messages have a loss, each (first, one behind the last) of them."""
    _template(tokenizer)
    text, spans = _render(messages, tokenizer), []
    for first, behind in learnt:
        start = _render(messages[:first], tokenizer, header=True) if first else ""
        stop = _render(messages[:behind], tokenizer)
        if not (text.startswith(stop) and stop.startswith(start)):
            raise DataError(
                f"the chat template does not render message {first} ({messages[first]['role']!r}) as a continuation of "
                "those before it, so that its place cannot be told: use a template with {% generation %}, or pass "
                "tokenised columns input_ids and labels"
            )
        spans.append((len(start), len(stop)))
    return _labelled(text, spans, tokenizer, special=False)


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise DataError(
            "the data holds conversations, and the tokenizer has no chat template: set tokenizer.chat_template, or "
            "pass a column of text"
        )
    return template


def _render(messages: Any, tokenizer: Any, *, header: bool = False) -> str:
    plain = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=header))


def _labelled(text: str, spans: list[tuple[int, int]], tokenizer: Any, *, special: bool) -> Tokens:
    """Tokens of a text, with labels for those that reach into one of the spans of characters, and for special tokens at
    the end behind one."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} tells no places of its tokens, so that prompts cannot be left out of the "
            "loss: load the fast tokenizer, or pass tokenised columns input_ids and labels"
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, labels, inside = list(found["input_ids"]), [], False
    for token, (first, last) in zip(ids, found["offset_mapping"], strict=True):
        if last > first:
            inside = any(first < stop and last > start for start, stop in spans)
        labels.append(token if inside else IGNORE)
    return ids, labels
