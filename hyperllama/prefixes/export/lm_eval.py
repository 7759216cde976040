"""Tasks for lm-evaluation-harness that score the very same tokens as `Reader.score`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from hyperllama.data.episode import Example
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.errors import UserError
from hyperllama.files import write_atomically


def lm_eval_task(
    path: str | Path, examples: Sequence[Example], text_format: TextFormat, name: str, *, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Write examples with choices as a task of lm-evaluation-harness; returns its YAML, which lies in the folder `path`.

    `lm_eval --model hf --model_args pretrained=BASE,peft=FOLDER,add_bos_token=False,dtype=float32 --tasks NAME --include_path
    PATH` then scores the tokens that `Reader.score` scores; each example is checked for that. An answer's end is scored as far
    as text can say it: "\\n\\n" at the end of a text is one token in many vocabularies, but two where a text goes on, and then
    the first of them counts. Without `add_bos_token=False` some tokenizers put a start token behind the prefix; `dtype` is
    else the checkpoint's. lm_eval resizes embeddings that are not as many as the tokenizer's tokens, which changes scores. The
    YAML has the data's absolute path.

    Raises UserError for no examples, an output that is no choice, tokens that would differ, or a name that cannot be typed.
    """
    path = Path(path).absolute()
    if not examples or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"task {name!r}: needs examples, and a name of letters, digits, dots, dashes and underscores")
    encoder, lines = Encoder(tokenizer, text_format, Limits()), []
    for number, example in enumerate(examples, 1):
        where = f"task {name}, example {number}"
        if example.output not in example.choices:
            raise UserError(f"{where}: {example.output[:60]!r} is not among its choices; correct the data")
        query = text_format.query.format(input=example.input)
        answers = [_answer(encoder, query, example.input, choice, where) for choice in example.choices]
        lines.append(json.dumps({"query": query, "choices": answers, "gold": example.choices.index(example.output)}))
    data = path / f"{name}.jsonl"
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    fields = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": ""}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    task = {"task": name, **source, "output_type": "multiple_choice", **fields, "num_fewshot": 0, "metric_list": metrics}
    write_atomically(data, "\n".join(lines) + "\n")
    write_atomically(path / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    return path / f"{name}.yaml"


def _answer(encoder: Encoder, query: str, asked: str, choice: str, where: str) -> str:
    """The text of a choice whose tokens, behind the query's, are the first of ours, as much of the end as can be had."""
    tokenizer, text_format = encoder.tokenizer, encoder.format
    prompt, tokens = encoder.prompt(asked), encoder.answer(choice)
    end = tokenizer.eos_token if text_format.end_token else text_format.separator
    # lm_eval moves white space that ends the query into the answer, and tokenises the two together.
    same_prompt = tokenizer(query.rstrip(), add_special_tokens=False)["input_ids"] == prompt
    for kept in range(len(end), 0 if end else -1, -1) if same_prompt and prompt and tokens else ():
        text = text_format.answer.format(output=choice) + end[:kept]
        ids = tokenizer(query + text, add_special_tokens=False)["input_ids"]
        if len(ids) > len(prompt) and ids == [*prompt, *tokens][: len(ids)] and text.strip():
            return text
    raise UserError(
        f"{where}: lm_eval would score other tokens for {choice[:60]!r}; let the query template end in a visible "
        "character, and the answer template begin with a space or a line break"
    )
