"""Token ids, chat template and stop tokens: Hugging Face's against llama.cpp's, from the file itself."""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.chat import CONVERSATIONS, render
from qconvert.errors import InputError
from qconvert.formats.gguf_pretokenizers import describe, differences
from qconvert.formats.llama_cpp import Model
from qconvert.report import Row, judged
from qconvert.tokenizer import Tokenizer, hard_corpus


def rows(model: Model, tokenizer: Tokenizer) -> list[Row]:
    return [ids_row(model, tokenizer), *chat_rows(model, tokenizer), *stop_rows(model, tokenizer)]


def ids_row(model: Model, tokenizer: Tokenizer) -> Row:
    """The shipped corpus of texts on which tokenizers tend to differ, cut by both.

    Where llama.cpp cuts as SentencePiece itself does, tokenizer.json is the one that differs: said, but no failure.
    """
    encode = tokenizer.reference()
    wanted = {text: encode(text) for text in dict.fromkeys(map(tokenizer.plain, hard_corpus()))}
    found = list(differences(tokenizer, wanted, model))
    wrong = [d for d in found if not d.as_sentencepiece]
    reason = describe(wrong[0], tokenizer) if wrong else ""
    if found and not wrong:
        reason = f"{len(found)} as SentencePiece has them, tokenizer.json has not"
    return judged("token ids", f"of {len(wanted)} texts differ", float(len(wrong)), 0.0, reason)


def chat_rows(model: Model, tokenizer: Tokenizer) -> Iterator[Row]:
    """The template as the file holds it, rendered and cut into tokens, against the checkpoint's."""
    template = tokenizer.chat_template
    if template is None:
        return
    tokens = {f"{name}_token": tokenizer.tokens[i] for name, i in tokenizer.special.items()}
    carried, encode, n = model.chat_template(), tokenizer.reference(), 0
    wrong, cut = list[str](), list[str]()
    for messages in CONVERSATIONS:
        try:
            text = render(template, messages, tokens)
        except InputError:  # the template refuses this conversation (a system turn, say)
            continue
        n += 1
        if carried is None or render(carried, messages, tokens) != text:
            wrong.append("the template was not carried over")
        elif model.tokenize(tokenizer.plain(text), False, True) != encode(tokenizer.plain(text)):
            cut.append(f"{text[:60]!r} is cut differently")
    if cut and not wrong and (reason := known_difference(tokenizer)):
        yield Row("chat template", f"of {n} conversations differ", float(len(cut)), None, "skip", reason)
        return
    wrong += cut
    yield judged("chat template", f"of {n} conversations differ", float(len(wrong)), 0.0, wrong[0] if wrong else "")


def known_difference(tokenizer: Tokenizer) -> str:
    """Why llama.cpp cuts text beside special tokens otherwise, whatever the file says; "" where it has no excuse."""
    if tokenizer.prefixes_only_first:
        return "llama.cpp puts a space after every special token, this tokenizer before the text alone"
    if any((t.lstrip or t.rstrip) and not t.text.isspace() for t in tokenizer.added):
        return "llama.cpp keeps white space beside special tokens, this tokenizer drops it"
    return ""


def stop_rows(model: Model, tokenizer: Tokenizer) -> Iterator[Row]:
    missed = [i for i in tokenizer.stops if not model.is_eog(i)]
    reason = f"llama.cpp would not stop at {tokenizer.tokens[missed[0]]!r}" if missed else ""
    yield judged("stop tokens", f"of {len(tokenizer.stops)} missed", float(len(missed)), 0.0, reason)
    wrong = int(model.add_bos != tokenizer.add_bos)
    yield judged("BOS", "differs", float(wrong), 0.0, f"llama.cpp adds BOS: {model.add_bos}" if wrong else "")
