"""Ollama's Modelfile: a Go template that makes what the model's chat template makes, or none; stop tokens; sampling."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qconvert import convert
from qconvert.chat import CONVERSATIONS, render
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.formats.gguf_gotemplate import Pieces, literal, rendered
from qconvert.formats.gguf_ollama import LONG, Found, go_template, sampling, stop_texts, template_lines
from qconvert.tokenizer import Tokenizer

TINY = Path("golden/tiny")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
BEGIN = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ 'GENERATE' }}{% endif %}"
USER = '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
ANSWER = '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
SYSTEM = (
    '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n'
)


def before(text: str) -> str:
    return END.replace("GENERATE", text)


CHATML = BEGIN + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + before("<|im_start|>assistant\n")
FAMILIES = {
    "chatml": CHATML,
    "default system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML,
    "llama3": BEGIN + "{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    + before("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "phi3": BEGIN + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + before("<|assistant|>\n"),
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + BEGIN
    + "{% set r = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + r + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}" + before("<start_of_turn>model\n"),
    "gemma3": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set p = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set p = '' %}{% endif %}" + BEGIN
    + "{% set r = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + r + '\n' + (p if loop.first else '') }}"
    "{{ m.content + '<end_of_turn>\n' }}" + before("<start_of_turn>model\n"),
    "mistral": "{{ bos_token }}" + BEGIN + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}",
    "hostile": BEGIN + "{{ '{{ .System }}\"\"\" }}\u3000\U0001f600' + m.role + '\r\n\t' + m.content + '\\\\' }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_go_template_makes_what_the_chat_template_makes(name: str, adds_bos: bool) -> None:
    found = go_template(FAMILIES[name], TOKENS, adds_bos)
    for conversation in (*CONVERSATIONS, *LONG):
        if conversation[0]["role"] == "system" and name in ("gemma", "mistral"):
            continue
        asked = list(conversation)
        if found.system and asked[0]["role"] != "system":
            asked.insert(0, {"role": "system", "content": found.system})
        wanted = render(FAMILIES[name], conversation, TOKENS)
        assert rendered(found.template, asked) == (wanted.removeprefix("<s>") if adds_bos else wanted)


def test_what_a_template_says_by_itself_is_system_or_a_note() -> None:
    assert go_template(FAMILIES["default system"], TOKENS, True).system == "Be kind."
    assert go_template(CHATML, TOKENS, True) == Found(USER + ANSWER + SYSTEM, "", ())
    assert [n.partition("template ")[2][:5] for n in go_template(FAMILIES["gemma"], TOKENS, True).notes] == ["takes", "trims"]


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ messages[-1].content }}",
        "fixed",
        CHATML + "{{ strftime_now('%d') }}",
        BEGIN + "{{ m.role + m.content | upper }}" + before("x"),
        BEGIN + "{{ m.content * 2 }}" + before("x"),
        BEGIN + "{{ '<' + loop.index | string + '>' + m.role + m.content }}" + before("x"),
        BEGIN + "{{ m.role + m.content + ('?' if loop.length > 4 else '') }}" + before("x"),
    ],
)
def test_templates_that_do_more_have_no_go_template(jinja: str) -> None:
    with pytest.raises(UnsupportedError, match="chat template"):
        go_template(jinja, TOKENS, True)
    lines = template_lines(tokenizer(jinja))
    assert len(lines) == 1 and lines[0].startswith("# no TEMPLATE: the chat template")


def tokenizer(jinja: str | None, stops: tuple[int, ...] = (1,), tokens: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    made: Any = SimpleNamespace(chat_template=jinja, special={"bos": 0, "eos": 1}, tokens=tokens, add_bos=True, stops=stops)
    return cast(Tokenizer, made)


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ messages * 10 ** 9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
]


@pytest.mark.parametrize("jinja", ENDLESS)
def test_templates_that_do_not_end_or_fill_the_memory_are_refused(jinja: str) -> None:
    start = time.thread_time()
    with pytest.raises(InputError, match="chat template"):
        render(jinja, CONVERSATIONS[1], TOKENS)
    assert time.thread_time() - start < 2


def test_products_that_are_small_are_made() -> None:
    assert render("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 'x' }}{{ 0.5 * 4 }}", CONVERSATIONS[0], TOKENS) == "---1024xxx2.0"


def test_lines_of_a_template_that_fails_and_of_none() -> None:
    assert template_lines(tokenizer(None)) == ["# no TEMPLATE: the model has no chat template"]
    (line,) = template_lines(tokenizer("{% if %}\n"))
    assert line.startswith("# no TEMPLATE: the chat template cannot be rendered") and "\n" not in line
    assert template_lines(tokenizer(FAMILIES["default system"]))[-1] == 'SYSTEM """Be kind."""'


def test_stops_are_those_that_a_modelfile_can_say() -> None:
    assert stop_texts(tokenizer("", (1, 2, 3, 1, 4), ("<s>", "</s>", 'a"b', "\n", "<|end|>"))) == ["</s>", "<|end|>"]


def test_sampling_is_what_generation_config_says() -> None:
    said: dict[str, object] = {"temperature": 0.6, "top_k": 20, "top_p": True, "repetition_penalty": 1.05, "eos_token_id": 3}
    lines = ["PARAMETER temperature 0.6", "PARAMETER top_k 20", "PARAMETER repeat_penalty 1.05"]
    assert sampling(said) == lines and sampling(said | {"do_sample": False}) == []


def test_modelfile_of_the_golden_model(tmp_path: Path) -> None:
    convert(str(TINY), quant="Q8_0", output=tmp_path / "t.gguf", modelfile=True, check=False)
    text = (tmp_path / "Modelfile").read_text("utf-8")
    assert text.startswith('FROM ./t.gguf\nTEMPLATE """{{ range')
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 256\n')
    with pytest.raises(UsageError, match="exists"):
        (tmp_path / "t.gguf").unlink()
        convert(str(TINY), quant="Q8_0", output=tmp_path / "t.gguf", modelfile=True, check=False)
    convert(str(TINY), quant="Q8_0", output=tmp_path / "u.gguf", modelfile=True, check=False)
    assert (tmp_path / "u.Modelfile").read_text("utf-8") == text.replace("t.gguf", "u.gguf")


def test_modelfile_is_refused_where_ollama_could_not_run_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Ollama runs no safetensors"):
        convert(str(TINY), to="safetensors", quant="bf16", output=tmp_path / "s", modelfile=True, check=False)
    with pytest.raises(UnsupportedError, match="one file"):
        convert(str(TINY), quant="F16", output=tmp_path / "t.gguf", split_max_size="1M", modelfile=True, check=False)
    assert list(tmp_path.iterdir()) == []


def test_a_long_context_is_left_to_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131072}))
    convert(str(folder), quant="Q8_0", output=tmp_path / "t.gguf", modelfile=True, check=False)
    line = (tmp_path / "Modelfile").read_text("utf-8").splitlines()[-1]
    assert line.startswith("# ") and line.endswith("PARAMETER num_ctx 131072")


# Go itself -------------------------------------------------------------------------------------------

GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type message struct { Role, Content string }
type job struct { Template, System string; Messages []message }

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
	var out []string
	for _, j := range jobs {
		var b strings.Builder
		t := template.Must(template.New("").Parse(j.Template))
		if err := t.Execute(&b, map[string]any{"System": j.System, "Messages": j.Messages}); err != nil { panic(err) }
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.peer
def test_go_makes_the_same_of_our_templates(tmp_path: Path) -> None:
    if (go := shutil.which("go")) is None:
        pytest.skip("Go is not installed")
    (tmp_path / "main.go").write_text(GO)
    jobs, wanted = [], []
    pieces = Pieces('"""{{', {"user": ("}}\\", "\U0001f600"), "system": ("\u200b", "")}, '"', "\t\x07")
    for template in (str(pieces), *(go_template(jinja, TOKENS, True).template for jinja in FAMILIES.values())):
        for c in (*CONVERSATIONS, *LONG):
            system = c[0]["content"] if c[0]["role"] == "system" else ""
            messages = [{"Role": m["role"], "Content": m["content"]} for m in c]
            jobs.append({"Template": template, "System": system, "Messages": messages})
            wanted.append(rendered(template, c))
    done = subprocess.run([go, "run", "main.go"], cwd=tmp_path, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


def test_literals_mean_themselves() -> None:
    for text in ("{{", "}}", "{", '"""', '""', "\u3000", "a\tb\nc", "\U0001f600", "\\n", "\x00", "{{ end }}", "｜▁"):
        assert rendered(literal(text), []) == text
    assert literal("｜▁ a\n") == "｜▁ a\n"  # as tokens are spelt that a person reads


@pytest.mark.parametrize("template", ["{{ .Prompt }}", "{{ if .X }}a{{ end }}", "{{ end }}", "{{ if not .System }}a"])
def test_what_is_not_written_is_not_evaluated(template: str) -> None:
    with pytest.raises(ValueError, match="known|without"):
        rendered(template, [])
