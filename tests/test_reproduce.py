"""The ledger of claims: complete, of commands that train.py takes, and fair in its verdicts."""

import csv

import pytest
import race
import reproduce
from conftest import write_homework

import augment
import models
import predict
import train


def test_the_ledger_has_a_row_for_each_claim_of_the_report():
    ids = [row.id for row in reproduce.LEDGER]
    expected = [f"B{n}" for n in range(1, 9)] + [f"V{n}" for n in range(1, 6)]
    assert ids == [*expected, *(f"F{n}" for n in range(13)), "E1", "E2"] and len(ids) == 28


def test_each_racer_and_ablation_is_a_command_that_train_takes_and_differs_from_the_others():
    for names in ([], ["--ablate"]):
        known = race.parse_args(names).known
        for flags in known.values():
            args = train.parse_args(flags.split())
            models.parse(args.model)
            augment.parse(args.augment)
        assert len(set(map(race.settings, known.values()))) == len(known) >= 3


def test_a_finished_run_of_the_race_is_made_again_on_another_machine_alone(tmp_path, monkeypatch):
    made = []

    def run(name, flags, minutes, seed, args):
        made.append((seed, args.machine))
        measured = dict(val_acc="0.4", epochs="3", took="1", gflops="100", date="")
        given = dict(minutes=f"{minutes:g}", seed=seed, machine=args.machine)
        told = dict(data="here.zip", racer=name, flags=flags, settings=race.settings(flags))
        return {**measured, **given, **told}

    monkeypatch.setattr(race, "race", run)
    monkeypatch.setattr(race, "gigaflops", lambda: 100.0)
    out = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    for machine in ("a", "a", "b"):
        given = ["--data", "here.zip", "--only", "quick", "--seeds", "2", "--machine", machine]
        race.main([*given, *out])
    assert made == [(0, "a"), (1, "a"), (0, "b"), (1, "b")]
    table = (tmp_path / "race.md").read_text().splitlines()
    assert [line.split(" | ")[2] for line in table[2:]] == ["2", "2"]  # seeds of each machine


@pytest.mark.parametrize("scale", list(reproduce.SCALES))
def test_each_run_is_a_command_that_train_takes_and_decides_a_row(scale):
    decided = {name for row in reproduce.LEDGER for name in reproduce.names_in(row)}
    assert decided == set(reproduce.RUNS)
    commands = [reproduce.command(name, scale) for name in reproduce.RUNS]
    assert len(set(commands)) == len(commands)
    for command in commands:
        args = train.parse_args(command.split())
        models.parse(args.model)
        augment.parse(args.augment)
        assert args.batch_size == 64 and args.momentum == 0.9  # common to all


def results(**accuracies):
    """What runs.csv would give if these runs had these validation accuracies, one a seed."""
    rows = [
        dict(
            scale="small",
            data="here.zip",
            command=reproduce.command(name, "small"),
            seed=str(seed),
            epochs="10",
            val_acc=str(value),
            best_val_acc=str(value),
            best_epoch="4",
            train_acc=str(value + 0.1),
        )
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return reproduce.Results(rows, "small", "here.zip")


def test_rules_are_judged_seed_by_seed_against_the_noise():
    # B4 - B1 is 0.001 and -0.001, B3 - B1 is -0.1 and B2 - B1 is 0 twice.
    seen = results(B1=[0.50, 0.60], B2=[0.50, 0.60], B3=[0.40, 0.50], B4=[0.501, 0.599])
    rules = ("B3 < B2", "B3 > B2", "B2 > B1", "B4 = B2", "B3 = B2", "B3 <= B2", "B2 <= B3")
    verdicts = [seen.judge(rule, "B")[0] for rule in rules]
    no = "does not hold"
    assert verdicts == ["holds", no, "within noise", "holds", no, "holds", no]
    assert "-0.100 ± 0." in seen.judge("B3 < B2", "B")[1]
    assert "2 seeds" in seen.judge("B3 < B2", "B")[1]
    assert seen.judge("peak(B1) < 0.6", "B")[0] == "holds"
    assert seen.judge("best(B1) > 0.55", "B")[0] == "within noise"  # one seed of two
    assert seen.judge("B5 > B2", "B")[0] == "not run"
    one = results(B1=[0.5], B2=[0.6])
    assert one.judge("B2 > B1", "B")[0] == "one seed only"


@pytest.mark.parametrize(
    "relation, difference, noise, expected",
    [
        (">", 0.02, 0.01, "holds"),
        (">", 0.01, 0.02, "within noise"),
        ("<", 0.02, 0.01, "does not hold"),
        (">>", 0.05, 0.01, "holds"),
        (">>", 0.025, 0.01, "within noise"),  # better, perhaps by less than 0.03
        (">>", 0.01, 0.01, "does not hold"),  # surely by less than 0.03
        ("<<", -0.05, 0.01, "holds"),
        ("<<", 0.05, 0.01, "does not hold"),
        ("=", 0.01, 0.01, "holds"),  # even if it is a difference
        ("=", 0.01, 0.03, "within noise"),
        ("=", -0.05, 0.01, "does not hold"),
        ("=", -0.035, 0.01, "within noise"),  # perhaps by less than 0.03
        ("<=", 0.02, 0.015, "within noise"),
        ("<=", -0.05, 0.01, "holds"),
        ("<=", 0.05, 0.01, "does not hold"),
        ("<=", 0.0, 0.04, "within noise"),
    ],
)
def test_a_relation_holds_only_where_the_noise_leaves_no_doubt(
    relation, difference, noise, expected
):
    assert reproduce.decide(relation, difference, noise) == expected


def test_runs_that_learnt_nothing_do_not_widen_the_noise_of_others():
    good = dict(F4=[0.5, 0.602], three=[0.5, 0.6], F2=[0.5, 0.6], F5=[0.6, 0.7])
    noise = results(**good).judge("F4 > three", "F")[1]
    good["F5"] = [0.1, 0.1]
    assert results(**good).judge("F4 > three", "F")[1] == noise
    good["F5"] = [0.1, 0.5]  # once, at least
    assert results(**good).judge("F4 > three", "F")[1] != noise


def test_a_row_holds_only_if_all_its_rules_do():
    args = reproduce.parse_args([])
    v1 = next(row for row in reproduce.LEDGER if row.id == "V1")
    better = {f"v{n}": [0.1 * n, 0.1 * n + 0.001] for n in range(2, 8)}
    assert reproduce.verdict(v1, results(**better), args)[0] == "holds"
    better["v5"] = [0.2, 0.3]
    assert reproduce.verdict(v1, results(**better), args)[0] != "holds"
    del better["v7"]
    assert reproduce.verdict(v1, results(**better), args)[0] == "not run"


def test_the_search_is_judged_as_train_judged_it(tmp_path):
    args = reproduce.parse_args(["--results", str(tmp_path)])
    log = {}

    def record(mix, level, **gains):
        """A round, on both seeds: the mix's accuracy, and gains without one augmentation."""
        for label, left in {"without ": mix, **predict.without_one(mix)}.items():
            accuracy = level + gains.get(label[len("without ") :], 0)
            log.update({(left, seed): accuracy for seed in (0, 1)})
        with open(tmp_path / "search-small.csv", "w", newline="") as file:
            lines = [(*key, value) for key, value in log.items()]
            csv.writer(file).writerows([("mix", "seed", "val_acc"), *lines])

    mix = reproduce.BIG
    for level, out in enumerate(("invert", "elastic", "equalize")):
        assert reproduce.search_verdict(args)[0] == "not finished"
        record(mix, level, **{out: 1})
        mix = predict.without_one(mix)[f"without {out}"]
    assert reproduce.search_verdict(args)[0] == "not finished"
    record(mix, 3, gray=-1)
    verdict, seen = reproduce.search_verdict(args)
    assert verdict == "holds" and "then no gain; worse without gray" in seen
    log.clear()
    record(reproduce.BIG, 0, gray=1)
    record(predict.without_one(reproduce.BIG)["without gray"], 1)
    assert reproduce.search_verdict(args)[0] == "does not hold"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data set of few classes, and a scale so small that a row takes seconds."""
    write_homework(tmp_path / "data")
    sizes = dict(classes=3, B=1, V=1, F=1, E=1, v14="width=16", seeds=dict(B=1, V=2, F=1, E=1))
    monkeypatch.setitem(reproduce.SCALES, "small", sizes)
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    return ["--data", str(tmp_path / "data"), *places, "--jobs", "2"]


def test_a_row_is_run_once_and_judged(tiny, tmp_path, capsys):
    argv = [*tiny, "--only", "V5"]
    reproduce.main(argv)
    assert capsys.readouterr().out.count(": done") == 4  # two runs, two seeds
    rows = predict.read_table(tmp_path / "results" / "runs.csv")
    assert {(row["command"].split()[1], row["seed"]) for row in rows} == {("v9", "0"), ("v9", "1")}
    assert all(0 <= float(row["val_acc"]) <= 1 and row["data"] == "data" for row in rows)
    table = (tmp_path / "results" / "ledger-small.md").read_text().splitlines()
    assert len(table) == 30 and "(2 seeds)" in table[14] and "not run" in table[2]
    labels = (tmp_path / "out" / "data" / "classes-3" / "labels.csv").read_text().splitlines()
    assert len({line.split(",")[1] for line in labels[1:]}) == 3
    reproduce.main(argv)
    assert ": done" not in capsys.readouterr().out
    reproduce.main([*argv, "--seeds", "3", "--dry-run"])
    assert capsys.readouterr().out.count("--seed 2") == 2


def test_what_is_wrong_with_a_command_is_said_in_a_sentence(tmp_path, capsys):
    for argv, told in (
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
        (["--jobs", "0"], "1 or more"),
        (["--seeds", "-1"], "1 or more"),
        (["--minutes", "nan"], "above 0"),
        (["--only", "F99"], "no such row"),
    ):
        with pytest.raises(SystemExit) as stop:
            reproduce.main([*argv, "--out", str(tmp_path), "--results", str(tmp_path)])
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_the_readme_shows_the_ledger_as_it_is():
    table = (reproduce.HERE / "ledger-small.md").read_text()
    assert table in (reproduce.HERE.parent / "README.md").read_text()
    assert table.count("\n") == 2 + 28 and "not run" not in table
