"""sample.py as a user runs it, on a tiny run made here: its formats, its pictures, its errors."""
import json

import pytest
import torch

import sample
import train
from rewards import TASKS, BadInput
from test_train import TINY, command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "toy"
    train.main([f"--out={out}", *TINY])
    return out


def draw(folder, *args):
    done = command(f"--run={folder}", *args, script="sample.py")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def scored(letters):
    return TASKS["toy"].reward(TASKS["toy"].encode([letters])).item()


def test_standard_output_holds_the_samples_alone(folder):
    lines, rest = draw(folder, "--n=7", "--seed=3")
    assert len(lines) == 7 and all(scored(letters) == pytest.approx(float(reward), abs=1e-4) for reward, letters in
                                   (line.split() for line in lines))
    assert "7 samples" in rest and "finetuned.pt" in rest and "mean reward" in rest
    assert draw(folder, "--n=7", "--seed=3")[0] == lines != draw(folder, "--n=7", "--seed=4")[0]
    assert "pretrained.pt" in draw(folder, "--which=pretrained")[1]


def test_fasta_jsonl_and_a_file(folder, tmp_path):
    lines, _ = draw(folder, "--n=3", "--format=fasta")
    assert [line[0] for line in lines[::2]] == [">"] * 3 and all(len(line) == 6 for line in lines[1::2])
    file = tmp_path / "samples.jsonl"
    assert draw(folder, "--n=3", "--format=jsonl", f"--out={file}")[0] == []
    for row, letters in zip(map(json.loads, file.read_text().splitlines()), lines[1::2]):
        assert row["sample"] == letters and row["reward"] == pytest.approx(scored(letters), abs=1e-6)


def test_prompt_batches_grid_and_corrector(folder):
    lines, _ = draw(folder, "--n=9", "--prompt=TC__G_", "--batch=4", "--steps=3", "--corrector_steps=2", "--corrector_t=0.6")
    assert len(lines) == 9 and all(line.split()[1][:2] == "TC" and line.split()[1][4] == "G" for line in lines)


def test_temperature_sharpens(folder, capsys):
    distinct = []
    for temperature in (0.02, 1):
        sample.main([f"--run={folder}", "--n=300", f"--temperature={temperature}"])
        distinct.append(len(set(capsys.readouterr().out.splitlines())))
    assert distinct[0] < 0.8 * distinct[1]


def test_compare_shows_both_models_and_their_means(folder):
    lines, _ = draw(folder, "--compare", "--n=5")
    assert len(lines) == 7 and "pretrained" in lines[0] and "finetuned" in lines[0]
    table = [line.split() for line in lines[1:6]]
    for column in (0, 2):
        mean = sum(float(row[column]) for row in table) / 5
        assert float(lines[6].split()[column]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("process", ["absorb", "uniform"])
def test_movie_and_histogram(process, tmp_path):
    train.main([f"--out={tmp_path}", f"--process={process}", *TINY, "--iters=1", "--steps=4"])
    movie, plot = tmp_path / "denoise.gif", tmp_path / "rewards.png"
    _, rest = draw(tmp_path, f"--movie={movie}", f"--plot={plot}", "--n=3")
    assert movie.read_bytes()[:3] == b"GIF" and plot.read_bytes()[:4] == b"\x89PNG"
    assert f"wrote {movie}" in rest and f"wrote {plot}" in rest


@pytest.mark.parametrize("args, message", [
    (["--runn=x"], "unknown flag --runn: did you mean run?"),
    (["--which=finetune"], "--which=finetune: did you mean finetuned?"),
    (["--format=fast"], "--format=fast: did you mean fasta?"),
    (["--n=0"], "--n=0: it must be at least 1"),
    (["--n=ten"], "--n=ten: a whole number is needed"),
    (["--batch=0"], "--batch=0: it must be at least 1"),
    (["--steps=-2"], "--steps=-2: it must be at least -1"),
    (["--seed=-1"], "--seed=-1: it must be at least 0"),
    (["--temperature=0"], "--temperature=0: it must be at least 0.01 and at most 100"),
    (["--corrector_steps=-1"], "--corrector_steps=-1: it must be at least 0"),
    (["--corrector_t=1"], "--corrector_t=1: it must be at least 0.01 and at most 0.99"),
    (["--device=gpu"], "--device=gpu: "),
    (["--prompt=TC"], "--prompt=TC has 2 letters: toy has 6 slots"),
    (["--prompt=TCXXXX"], "'X' at position 3 of 'TCXXXX' is not in the alphabet 'ACGT'"),
    (["--movie=a.mp4"], "--movie=a.mp4: a name that ends in .gif is needed"),
    (["--movie=a.gif", "--compare"], "--movie shows one model"),
    (["--plot=a.gif"], "--plot=a.gif: a name that ends in .png is needed"),
    (["--compare", "--format=fasta"], "--compare prints a table"),
    (["--run=/nowhere"], "--run=/nowhere holds no run of train.py"),
    (["--out=/nowhere/file"], "cannot write to --out=/nowhere/file"),
    (["--plot=/nowhere/a.png"], "cannot write /nowhere/a.png"),
    (["file"], "unexpected 'file': flags are written --name=value"),
])
def test_bad_flags_get_one_line_and_status_2(args, message, folder, capsys, monkeypatch):
    before = sorted(folder.iterdir())
    monkeypatch.setattr("sys.argv", ["sample.py", *([] if args[0].startswith("--run=") else [f"--run={folder}"]), *args])
    with pytest.raises(SystemExit) as stop:
        train.run(sample.main)
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and errors[-1].startswith("sample.py: ") and message in errors[-1]
    assert len(errors) == 1 or "out" in args[0]                # the samples are written last
    assert sorted(folder.iterdir()) == before


def test_a_run_without_a_model_yet(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(BadInput, match="holds no model yet"):
        sample.main([f"--run={tmp_path}"])


def test_help_shows_every_flag():
    shown = command("--help", script="sample.py").stdout
    assert all(f"--{name} " in shown for name in sample.Options.__dataclass_fields__)
    assert torch.__version__ not in shown and "(default: out/toy)" in shown
