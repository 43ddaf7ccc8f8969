"""Does the memory of a step with GradCache grow with the batch? Peak resident memory of one process per size.

    python benchmarks/grad_cache.py

One PAIR step of all-MiniLM-L6-v2 whole on synthetic texts: queries of 32 tokens, passages of 128, one hard negative a
row. Each line is a process of its own; "grew by" is the peak above what the loaded model and the texts take.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = ((False, 32), (False, 128), (True, 32), (True, 128), (True, 512), (True, 1024))
WORDS = "a the of light river stone paper window garden signal number market letter engine"


def take_step(cached: bool, rows: int) -> tuple[float, float]:
    """Take one step and return (MiB that the process grew by at most, seconds)."""
    import torch

    from pairdr.collection import open_collection
    from pairdr.config import ModelConfig, TrainConfig
    from pairdr.encoder import DualEncoder
    from pairdr.formats import Examples, write_examples
    from pairdr.loop import State, backward_batch, read_batches, update_parameters
    from pairdr.records import Example
    from pairdr.tuning import make_optimizer, prepare_model

    config = TrainConfig(per_device_train_batch_size=rows, grad_cache=cached, dropout=0.0, learning_rate=1e-7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_texts(folder, rows)
        data = open_collection(folder)
        examples = (
            Example(f"q{at}", f"p{at}", (f"n{at}",), (f"p{at}",), "labelled", 0.0, (0.0,)) for at in range(rows)
        )
        write_examples(folder / "examples.arrow", examples)
        encoder = DualEncoder.load(ModelConfig(start="minilm", device="cpu"))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        with prepare_model(encoder, config) as model:
            model.train()
            optimizer = make_optimizer(model, config)
            batch = next(read_batches(Examples.open(folder / "examples.arrow"), config, State(batch_size=rows)))
            before, begin = _read_memory("VmRSS"), time.perf_counter()
            backward_batch(data, encoder, batch, 0.1, config, scaler)
            update_parameters(model, optimizer, scaler, 1e-7, config, 1)
            return _read_memory("VmHWM") - before, time.perf_counter() - begin


def main() -> None:
    """Run every size in a process of its own."""
    if len(sys.argv) == 3:
        grown, seconds = take_step(sys.argv[1] == "True", int(sys.argv[2]))
        print(f"{grown:.0f} {seconds:.2f}")
        return
    print(f"{'':12}{'rows':>6}{'grew by, MiB':>14}{'s':>9}{'ms a row':>10}")
    for cached, rows in SIZES:
        found = subprocess.run(
            [sys.executable, __file__, str(cached), str(rows)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()
        seconds = float(found[1])
        title = "GradCache" if cached else "direct"
        print(f"{title:12}{rows:6}{found[0]:>14}{seconds:9.1f}{1000 * seconds / rows:10.0f}", flush=True)


def _write_texts(folder: Path, rows: int) -> None:
    rng = random.Random(0)

    def draw(words: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=words))

    (folder / "qrels").mkdir()
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for kind in "pn":
            stream.writelines(f'{{"_id": "{kind}{at}", "text": "{kind}{at} {draw(140)}"}}\n' for at in range(rows))
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(f'{{"_id": "q{at}", "text": "q{at} {draw(40)}"}}\n' for at in range(rows))
    with (folder / "qrels" / "train.tsv").open("w", encoding="utf-8") as stream:
        stream.write("query-id\tcorpus-id\tscore\n" + "".join(f"q{at}\tp{at}\t1\n" for at in range(rows)))


def _read_memory(field: str) -> float:
    """Return a field of this process's status in MiB: resident memory now (VmRSS), or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
