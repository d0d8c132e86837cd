"""Preview: what it shows is what is learned, and it can be read."""

from __future__ import annotations

import json
import re

import pytest

from sealion_jax import preview
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.data.mixture import Mixture, MixtureConfig, SourceConfig
from sealion_jax.data.packing.windows import PackedWindows
from sealion_jax.data.rendering import TERMINAL, render_step
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import write_store
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    ("Nasi goreng is fried rice, eaten at any time of the day.", "en"),
    ("Nasi goreng adalah nasi yang digoreng,\ndimakan kapan saja.", "id"),
    ("ข้าวผัดทำจากข้าวสวย กินได้ทุกเวลา", "th"),
    ("He wrote <eos> and <bos> on the board.", "en"),
    ("Bell\x07, escape \x1b[31mred, and \u202eturned\u202c round.", "en"),
] * 3
LENGTH, ROWS = 24, 4

RECIPE = """
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.model.config import gemma3_270m
from sealion_jax.recipe import TrainConfig

def recipe():
    return TrainConfig(
        name="previewed",
        tokenizer={tokenizer!r},
        model=gemma3_270m(),
        data=MixtureConfig(sources=(SourceConfig(name="web", store={store!r}),)),
        sequence_length_tokens={length},
        global_batch_size={rows},
        steps=10,
    )
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    tokenizer = train_tokenizer([t for t, _ in TEXTS], vocab_size=640, path=folder / "tokenizer.model")
    write_store(folder / "web", TEXTS, tokenizer=tokenizer)
    recipe = folder / "recipe.py"
    recipe.write_text(
        RECIPE.format(
            tokenizer=str(folder / "tokenizer.model"), store=str(folder / "web"), length=LENGTH, rows=ROWS
        )
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(world) -> Tokenizer:
    return Tokenizer.load(world / "tokenizer.model")


@pytest.fixture(scope="module")
def batches(world) -> GlobalBatches:
    config = MixtureConfig(sources=(SourceConfig(name="web", store=str(world / "web")),))
    windows = PackedWindows(TokenStore.open(world / "web"), LENGTH)
    return GlobalBatches(Mixture(config, [windows], global_batch_size=ROWS), global_batch_size=ROWS)


def show(batches, tokenizer, step, **options) -> list[str]:
    return list(render_step(batches, tokenizer, step, **options))


def test_over_an_epoch_the_text_that_is_shown_as_learned_is_every_document_once(batches, tokenizer):
    windows = len(batches.mixture.sources[0])
    learned = {}
    for element in range(windows):
        step, row = divmod(element, ROWS)
        lines = show(batches, tokenizer, step, rows=[row])
        text = "\n".join(line[4:] for line in lines if line.startswith("    "))
        text = re.sub(r"⟦.*?⟧\n?", "", text.replace("<eos>\n", "<eos>"), flags=re.DOTALL)
        beyond = re.search(r"^  the last token predicts '(.*)', with", lines[-1])
        if beyond:
            text += beyond[1].replace("▁", " ").replace("\\n", "\n")
        learned[batches.documents(step, row).window] = text
    shown = "".join(learned[window] for window in range(windows))
    expected = "".join(text + "<eos>" for text, _ in TEXTS)
    for raw, written in (("\x07", "\\x07"), ("\x1b", "\\x1b"), ("\u202e", "\\u202e"), ("\u202c", "\\u202c")):
        expected = expected.replace(raw, written)
    assert _bytes_joined(shown) == expected


def _bytes_joined(text: str) -> str:
    """Characters that a window's end cut into byte pieces, put together again."""
    return re.sub(r"(?:<0x[0-9A-F]{2}>)+", lambda m: bytes.fromhex(re.sub(r"<0x|>", "", m[0])).decode(), text)


def test_headings_name_source_language_document_and_place(batches, tokenizer):
    store = batches.mixture.sources[0].store
    lines = show(batches, tokenizer, 1)
    assert lines[0] == f"step 1: batch 1, {ROWS} rows"
    for row in range(ROWS):
        batch, origin = batches.rows(1, [row]), batches.documents(1, row)
        used = int((batch["segment_ids"][0] > 0).sum())
        heading = (
            f"row {row}: web (epoch 0, window {origin.window} of {origin.windows}), {used} tokens, "
            f"{LENGTH - used} padding, {int(batch['loss_mask'].sum())} in the loss"
        )
        at = lines.index(heading)
        for span in origin.spans:
            start = (
                f"  segment {span.segment}: {TEXTS[span.document][1]}, document {span.document} (memory, row "
            )
            start += f"{span.document + 1}), "
            assert any(line.startswith(start) for line in lines[at:])
            assert span.document_tokens == len(store.document(span.document))


def test_control_tokens_are_told_from_text_that_spells_them(batches, tokenizer):
    lines = []
    for step in range(len(batches.mixture.sources[0]) // ROWS):
        lines += show(batches, tokenizer, step, marks=TERMINAL)
    text = "\n".join(lines)
    assert "\x1b[7m<eos>\x1b[27m" in text and "\x1b[7m<bos>\x1b[27m" in text
    assert "wrote <eos> and" in text


def test_nothing_in_a_document_reaches_the_terminal_as_a_command(batches, tokenizer):
    for step in range(len(batches.mixture.sources[0]) // ROWS):
        for line in show(batches, tokenizer, step):
            assert not set(line) & set("\x07\x1b\r\u202e\u202c")


def test_long_parts_are_shortened_in_the_middle(batches, tokenizer):
    lines = show(batches, tokenizer, 0, rows=[0], most_tokens=8)
    long = [s for s in batches.documents(0, 0).spans if s.row_stop - s.row_start > 8]
    assert long
    assert sum(f" [{s.row_stop - s.row_start - 8} tokens] " in line for s in long for line in lines) >= len(
        long
    )
    shortened, full = (
        sum(len(re.sub(r" \[\d+ tokens\] ", "", line)) for line in some if line.startswith("    "))
        for some in (lines, show(batches, tokenizer, 0, rows=[0]))
    )
    assert shortened < full


def test_the_command_shows_a_step_or_a_row(world, batches, tokenizer, capsys):
    preview.main([str(world / "recipe.py"), "--step", "1", "--row", "2"])
    assert capsys.readouterr().out.splitlines() == show(batches, tokenizer, 1, rows=[2])
    preview.main([str(world / "recipe.py"), "--step", "2"])
    assert capsys.readouterr().out.count("\nrow ") == ROWS
    preview.main([str(world / "recipe.py"), "--step", "1", "--global-batch-size", "2"])
    assert capsys.readouterr().out.startswith("step 1: batch 1, 2 rows\n")


def test_the_command_leaves_out_what_a_run_has_skipped(world, tmp_path, capsys):
    words = [str(world / "recipe.py"), "--step", "1", "--run-dir"]
    files = []
    for number, count in ((4, 2), (8, 3)):
        step = tmp_path / "checkpoints" / str(number)
        step.mkdir(parents=True)
        files.append(step / "train.json")
        files[-1].write_text(json.dumps({"step": number, "skips": [[1, count]], "counters": {}}))
        write_digests(step)
    preview.main([*words, str(tmp_path)])
    assert capsys.readouterr().out.startswith("step 1: batch 4, ")
    files[1].write_text(files[1].read_text().replace("3", "2"))
    preview.main([*words, str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.out.startswith("step 1: batch 3, ")
    assert shown.err == f"checkpoint 8 is damaged: {files[1]}\n"
    files[0].unlink()
    for run_dir in (tmp_path, tmp_path / "other"):
        with pytest.raises(UserError, match="has no good checkpoint; leave --run-dir out"):
            preview.main([*words, str(run_dir)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "-1"], "the first step's batch is 0"),
        (["--step", "0", "--row", "4"], "rows 0 to 3"),
        (["--step", "0", "--data.sources.web.store", "nowhere"], "no token store at nowhere"),
    ],
)
def test_mistakes_are_told(world, options, message):
    with pytest.raises(UserError, match=message):
        preview.main([str(world / "recipe.py"), *options])
