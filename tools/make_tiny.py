"""Train the model and the adapter that lie in golden/: a small Llama that explains Python in prose, a LoRA that makes
it answer in Python.

    python tools/make_tiny.py golden            # about five CPU minutes, one thread

The text is what every Python carries: pydoc's topics and the docstrings of the standard library, for the adapter with
the definitions they belong to. Same seed, same Python, same torch: same bytes. Every row is a multiple of 256 weights.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

SEED = 20260
N_VOCAB = 1024
CONTEXT = 256
BOS, EOS, BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELD_OUT = ("heapq", "shutil", "statistics", "textwrap")  # modules that neither training sees


class Training(NamedTuple):
    steps: int
    batch: int
    rate: float
    report: int = 50  # steps between two lines on stderr


MODEL = Training(steps=700, batch=4, rate=1e-2)
ADAPTER = Training(steps=150, batch=4, rate=1e-2)


def stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def chat(question: str, answer: str) -> str:
    return f"{BEGIN}user\n{question}{END}\n{BEGIN}assistant\n{answer}{END}\n"


def prose(text: str) -> list[str]:
    """The paragraphs that are sentences, each on one line: no grammars, examples or headings."""
    plain = text.translate(str.maketrans("“”‘’", "\"\"''"))
    lines = (" ".join(paragraph.split()) for paragraph in plain.split("\n\n"))
    return [line for line in lines if line[:1].isalpha() and line.endswith((".", ":")) and "::=" not in line]


def topics() -> dict[str, list[str]]:
    """The paragraphs of pydoc's help topics: the prose of Python's language reference."""
    from pydoc_data.topics import topics as text

    return {name: prose(text[name]) for name in sorted(text)}


class Definition(NamedTuple):
    """A public function or class of the standard library."""

    name: str  # textwrap.dedent
    head: str  # def dedent(text):
    meaning: str  # the first paragraph of its docstring

    @property
    def code(self) -> str:
        return f'{self.head}\n    """{self.meaning}"""'


def definitions(held_out: bool = False) -> Iterator[Definition]:
    """Those of all modules but HELD_OUT, or of those."""
    for path in sorted(stdlib().glob("*.py")):
        public = path.stem in sys.stdlib_module_names and not path.stem.startswith("_")
        if not public or (path.stem in HELD_OUT) != held_out:
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                args = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                head = f"{'def' if args else 'class'} {node.name}{args}:"
                for meaning in prose(ast.get_docstring(node) or "")[:1]:
                    yield Definition(f"{path.stem}.{node.name}", head, meaning)


def model_text() -> list[str]:
    """One string a document: every topic as it is, and topics and docstrings as a question and its answer."""
    documents = ["\n".join(paragraphs) for paragraphs in topics().values()]
    documents += [chat(f"What is {name}?", paragraphs[0]) for name, paragraphs in topics().items() if paragraphs]
    documents += [chat(f"What does {d.name} do?", d.meaning) for d in definitions()]
    return [text for text in documents if text]


def code_text(held_out: bool = False) -> list[str]:
    """The same questions, answered by the definition itself: the adapter's text."""
    return [chat(f"What does {d.name} do?", d.code) for d in definitions(held_out)]


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenizer, of 1024 tokens, trained on both texts and saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[BOS, EOS, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*model_text(), *code_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = CONTEXT
    fast.save_pretrained(folder)
    return tokenizer


def make_model() -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=1,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """i64[T]: all documents in one seeded random order, each between its begin and end tokens."""
    import torch

    shuffled = random.Random(SEED).sample(documents, len(documents))
    end = tokenizer.token_to_id(EOS)
    return torch.tensor([i for text in shuffled for i in (*tokenizer.encode(text).ids, end)])


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the model's matrices (it needs half of AdamW's steps here), AdamW for the rest and for an adapter."""
    import torch

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and "embed" not in name and "lora" not in name]
    rest = [p for p in trained.values() if not any(p is m for m in matrices)]
    adam = torch.optim.AdamW(rest, lr=rate / 2 if matrices else rate, betas=(0.9, 0.95), weight_decay=0.0)
    if not matrices:
        return [adam]
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), adam]


def train(model: torch.nn.Module, tokens: torch.Tensor, how: Training) -> None:
    """Random windows of CONTEXT tokens; the rate rises for 20 steps, stays, and falls to nothing from half-way on."""
    import torch

    torch.manual_seed(SEED)
    both = optimizers(model, how.rate)
    weights = [p for p in model.parameters() if p.requires_grad]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 20, 2 - 2 * s / how.steps)) for o in both
    ]
    began = time.process_time()
    for step in range(1, how.steps + 1):
        starts = torch.randint(len(tokens) - CONTEXT, (how.batch,)).tolist()
        batch = torch.stack([tokens[s : s + CONTEXT] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % how.report == 0:
            seconds = time.process_time() - began
            print(f"step {step:4d}  loss {loss.item():.3f}  {seconds:.0f} CPU s", file=sys.stderr)


def mean_nll(model: torch.nn.Module, tokens: torch.Tensor, windows: int = 16) -> float:
    """Mean negative log likelihood (nats) of the first windows of CONTEXT tokens."""
    import torch

    n = min(windows, len(tokens) // CONTEXT)
    batch = tokens[: n * CONTEXT].reshape(n, CONTEXT)
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def make_adapter(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> dict[str, float]:
    """Train and save the LoRA; losses on definitions that it never saw, without it and with it."""
    import torch
    from peft import LoraConfig, get_peft_model

    held_out = encode(tokenizer, code_text(held_out=True))
    losses = {"code": mean_nll(model, held_out)}
    torch.manual_seed(SEED)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    train(peft, encode(tokenizer, code_text()), ADAPTER)
    peft.peft_config["default"].base_model_name_or_path = "golden/tiny"
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config_file = folder / "adapter_config.json"
    settings = json.loads(config_file.read_text("utf-8"))
    settings["target_modules"].sort()  # PEFT writes a set, in another order each time
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    return {**losses, "code_with_adapter": mean_nll(peft, held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where tiny/ and tiny-lora/ are written")
    folder: Path = parser.parse_args().folder
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)  # the order of sums, and so the bytes, depend on it
    tokenizer = make_tokenizer(folder / "tiny")
    model = make_model()
    tokens = encode(tokenizer, model_text())
    print(f"{len(tokens)} tokens, {sum(p.numel() for p in model.parameters())} parameters", file=sys.stderr)
    train(model, tokens, MODEL)
    model.to(torch.bfloat16).save_pretrained(folder / "tiny")
    stored = LlamaForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)  # as rounded
    losses = {"prose": mean_nll(stored, tokens), **make_adapter(stored, tokenizer, folder / "tiny-lora")}
    print(json.dumps({name: round(loss, 4) for name, loss in losses.items()}))


if __name__ == "__main__":
    main()
