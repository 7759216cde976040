"""What a user would do without this package: adapters of stock PEFT, trained by stock Trainer on 16 examples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hyperllama.base.loading import load_base
from hyperllama.data.episode import Episode
from hyperllama.data.text import Encoder

# The best of 3e-4, 1e-3, 3e-3 and 1e-2 for LoRA, and of 1e-3, 3e-3, 1e-2 and 3e-2 for prefixes, after 30 s on each of three
# training tasks. For LoRA the first two are alike (90 and 88 % of 48 queries), and the larger one is quicker.
RATES = {"peft prefix tuning": 1e-2, "peft lora": 1e-3}


class Adapted:
    """A base with a new adapter of `RATES`: it is trained for some seconds, and answers."""

    def __init__(self, method: str, base: str, encoder: Encoder, *, rows: int, seed: int):
        set_seed(seed)
        model = load_base(base, dtype="bfloat16")
        model.set_attn_implementation("sdpa")
        if method == "peft prefix tuning":
            settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)
        else:
            settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        self.model, self.rate, self.encoder = get_peft_model(model, settings), RATES[method], encoder

    def train(self, episode: Episode, seconds: float) -> tuple[int, float]:
        """Train on an episode's demonstrations for so many seconds; returns steps, and the seconds that they took."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=16, learning_rate=self.rate, lr_scheduler_type="constant", max_steps=10_000,
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            examples = Examples(self.encoder, episode)
            trainer = Trainer(self.model, arguments, train_dataset=examples, callbacks=[Deadline(seconds)])
            self.model.train()
            start = time.perf_counter()
            trainer.train()
            return trainer.state.global_step, time.perf_counter() - start

    @torch.no_grad()
    def answers(self, inputs: Sequence[str]) -> list[str]:
        """Greedy answers, one by one: PEFT's generate and padding on the left do not agree on positions."""
        self.model.eval()
        ends, answers = {self.encoder.tokenizer.eos_token_id}, []
        for text in inputs:
            prompt, said = list(self.encoder.prompt(text)), []
            for _ in range(12):
                logits = self.model(input_ids=torch.tensor([prompt + said])).logits
                said.append(logits[0, -1].argmax().item())
                if said[-1] in ends or self.encoder.format.separator in self.encoder.tokenizer.decode(said):
                    break
            answers.append(self.encoder.answer_of(said))
        return answers


class Examples(Dataset):
    """Each example as a padded row of prompt and answer, with the loss on the answer."""

    def __init__(self, encoder: Encoder, episode: Episode):
        self.rows = []
        for example in episode.demonstrations:
            prompt, answer = encoder.prompt(example.input), encoder.answer(example.output)
            self.rows.append(([*prompt, *answer], [*[-100] * len(prompt), *answer]))
        self.width = max(len(ids) for ids, _ in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        ids, labels = self.rows[i]
        more = self.width - len(ids)
        mask = [1] * len(ids) + [0] * more
        padded = {"input_ids": ids + [0] * more, "attention_mask": mask, "labels": labels + [-100] * more}
        return {name: torch.tensor(values) for name, values in padded.items()}


class Deadline(TrainerCallback):
    """Stops training after so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Look at the clock."""
        control.should_training_stop = time.perf_counter() - self.start >= self.seconds
