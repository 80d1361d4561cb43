"""report.html of the demo: corpus funnel, loss curve, export check and sample in one self-contained page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2

from opencoder.files import write_text
from opencoder.train.metrics import read_rows

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>OpenCoder demo</title>
<style>
body { margin: 0 auto; max-width: 900px; padding: 24px 16px 64px;
       font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fbfcfd; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 8px; } .soft { color: #5c6b7e; }
table { border-collapse: collapse; width: 100%; background: #fff; }
td, th { padding: 6px 10px; border-bottom: 1px solid #dfe5ec; text-align: left; }
.n { text-align: right; } .bar { background: #e9eef3; border-radius: 4px; height: 12px; min-width: 160px; overflow: hidden; }
.bar i { display: block; height: 12px; background: #2f7d5b; } img { max-width: 100%; }
pre { background: #f1f4f7; padding: 12px; border-radius: 8px; white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; }
</style></head><body>
<h1>OpenCoder demo</h1>
<p class="soft">Raw files to generated text on the Python standard library, in {{ seconds }} s. The corpus has
<a href="corpus/report.html">a report of its own</a>.</p>
<h2>Corpus</h2>
<table><tr><th>stage</th><th class="n">files in</th><th class="n">dropped</th><th>left of all</th></tr>
{% for row in funnel %}<tr><td>{{ row.stage }}</td><td class="n">{{ row.files_in }}</td><td class="n">{{ row.dropped }}</td>
<td><div class="bar"><i style="width:{{ 100 * (row.files_in - row.dropped) / total }}%"></i></div></td></tr>{% endfor %}</table>
<p>{{ tokens }} tokens in {{ documents }} documents.</p>
<h2>Training</h2>
<img alt="loss by step" src="data:image/png;base64,{{ plot }}">
<p>First loss {{ '%.3f' % t.first_loss }} (ln of the vocabulary {{ '%.3f' % t.ln_vocab }}), last {{ '%.3f' % t.last_loss }}.
Held-out loss {{ '%.3f' % t.valid_loss }}; the entropy of the same tokens taken one by one is {{ '%.3f' % t.unigram_entropy }}.
Two processes, tensor parallel, {{ '%.0f' % t.tokens_per_s }} tokens/s; stopped by SIGTERM and resumed at step {{ t.resumed_from }}.</p>
<h2>Export</h2>
<p>Logits of the Hugging Face checkpoint differ from ours by at most {{ '%.1e' % e.max_logit_difference }}.
Text that transformers generates from it:</p>
<pre>{{ e.sample }}</pre>
</body></html>
"""


def write_report(root: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write ROOT/report.html from what the stages returned."""
    report = results["corpus"]["report"]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    text = page.render(
        seconds=round(sum(r["seconds"] for r in results.values())),
        funnel=report["funnel"],
        total=max(report["counts"]["in"], 1),
        tokens=f"{results['dataset']['tokens']:,}",
        documents=results["dataset"]["documents"],
        t=results["training"],
        e=results["export"],
        plot=loss_curve(root / "run" / "metrics.jsonl", results["training"]),
    )
    write_text(root / "report.html", text)


def loss_curve(metrics: Path, training: dict[str, Any]) -> str:
    """The plot as base64 PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(metrics)
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes.plot(
        [r["step"] for r in rows], [r["loss"] for r in rows], color="#2f7d5b", linewidth=1.4, label="training loss"
    )
    held = [r for r in rows if "valid_loss" in r]
    axes.plot([r["step"] for r in held], [r["valid_loss"] for r in held], "o", color="#c96a4a", label="held-out loss")
    axes.axhline(training["unigram_entropy"], color="#5c6b7e", linestyle="--", linewidth=1, label="unigram entropy")
    axes.axvline(training["resumed_from"], color="#5c6b7e", linestyle=":", linewidth=1, label="interrupted and resumed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
