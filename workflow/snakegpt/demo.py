"""`make demo`: run the report of the gpt2 experiment and say what came out of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from snakegpt.errors import reports_errors
from snakegpt.progress import duration, quantity

REPORT = Path("results/reports/gpt2/report.html")


@reports_errors
def main() -> None:
    started = time.monotonic()
    status = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "all", "report_gpt2"], check=False
    ).returncode
    if status:
        raise SystemExit(status)
    summary = json.loads(REPORT.with_name("summary.json").read_text(encoding="utf-8"))
    print(f"""
report            {REPORT.absolute().as_uri()}
validation loss   {summary["loss_nats"]:.4f} nats a token, {summary["bits_per_byte"]:.3f} bits a byte
training speed    {quantity(summary["rate_tokens_per_s"])} tokens/s
time              {duration(time.monotonic() - started)}""")


if __name__ == "__main__":
    main()
