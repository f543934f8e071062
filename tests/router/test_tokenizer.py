"""Model directories as they come: templates here or there, parity with transformers, errors in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from router.chat_template import ChatTemplate, TemplateRefusal
from router.tokenizer import Tokenizer, load

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🙂 <b>&'\"</b>"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]

TEMPLATES = {
    "plain": "{% for m in messages %}\n    {{- m.role }}: {{ m.content|trim }}\n{% endfor %}\n{{ x }}",
    "json": "{{ bos_token }}{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
    "loop": "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "state": "{% set ns = namespace(k=0) %}{% for m in messages %}{% set ns.k = loop.index %}{% endfor %}{{ ns.k }}{{ tools }}",
    "missing": "[{{ messages[0].tool_calls }}{{ nothing }}{{ messages[0]['x'] is defined }}]{{ add_generation_prompt }}",
    "date": "{{ strftime_now('%Y') }}{{ enable_thinking | default('unset') }}",
}


def test_encode(tokenizer: Tokenizer) -> None:
    text = "The <|im_start|>fox🙂"
    ids = tokenizer.encode_now(text, True)
    assert 1 in ids
    assert b"".join(tokenizer.vocabulary.token_bytes(t) for t in ids).decode() == text
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_parity_with_transformers(model_path: Path, tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    path = _copy(model_path, tmp_path, chat_template=None, bos_token="<|endoftext|>")
    (path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    ours = load(path)
    for generation in (True, False):
        for variables in ({}, {"enable_thinking": False, "x": "y"}):
            want = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation, **variables)
            assert ours.render(CHAT, generation, variables) == want
            ids = theirs.apply_chat_template(CHAT, add_generation_prompt=generation, return_dict=False, **variables)
            assert ours.encode_now(want, add_special_tokens=False) == ids


def test_template_of_the_config(tokenizer: Tokenizer, model_path: Path, tmp_path: Path) -> None:
    want = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(CHAT[-1:]) == want
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert load(_copy(model_path, tmp_path, chat_template=named)).render(CHAT) == "yes"
    assert not load(_copy(model_path, tmp_path, chat_template=named[:1])).has_chat_template
    without = load(_copy(model_path, tmp_path, chat_template=None))
    with pytest.raises(ValueError, match="no chat template"):
        without.render(CHAT)


def test_refusal_and_sandbox() -> None:
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(CHAT, True, {})
    for escape in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[9].content.x }}"):
        with pytest.raises(TemplateRefusal):
            ChatTemplate(escape, {}).render(CHAT, True, {})


def test_broken_directories(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="chat template is broken"):
        load(_copy(model_path, tmp_path, chat_template="{% for"))
    with pytest.raises(ConfigError, match="must be a text"):
        load(_copy(model_path, tmp_path, chat_template={"a": 1}))
    path = _copy(model_path, tmp_path)
    document = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(
        json.dumps({**document, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    )
    with pytest.raises(ConfigError, match="WordPiece"):
        load(path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read") as error:
        load(path)
    assert "\n" not in str(error.value)


def _copy(model_path: Path, tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "copy"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(model_path, path)
    config = json.loads((path / "tokenizer_config.json").read_text()) | changes
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path
