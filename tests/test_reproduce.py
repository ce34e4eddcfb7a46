"""The ledger of claims: complete, of commands that train.py takes, and fair in its verdicts."""

import pytest
import reproduce

import augment
import models
import train


def test_the_ledger_has_a_row_for_each_claim_of_the_report():
    ids = [row.id for row in reproduce.LEDGER]
    expected = [f"B{n}" for n in range(1, 9)] + [f"V{n}" for n in range(1, 6)]
    assert ids == [*expected, *(f"F{n}" for n in range(13)), "E1", "E2"] and len(ids) == 28


@pytest.mark.parametrize("scale", list(reproduce.SCALES))
def test_each_run_is_a_command_that_train_takes_and_decides_a_row(scale):
    decided = reproduce.wanted(reproduce.parse_args([]))
    assert sorted(decided) == sorted(reproduce.RUNS)
    commands = [reproduce.command(name, scale) for name in reproduce.RUNS]
    assert len(set(commands)) == len(commands)
    for command in commands:
        args = train.parse_args(command.split())
        models.parse(args.model)
        augment.parse(args.augment)
        assert args.batch_size == 64 and args.momentum == 0.9  # common to all


def rows(**accuracies):
    """runs.csv as if these runs had these validation accuracies, one a seed."""
    return [
        dict(
            scale="small",
            command=reproduce.command(name, "small"),
            seed=str(seed),
            epochs="10",
            val_acc=str(value),
            best_val_acc=str(value),
            best_epoch="4",
            train_acc=str(value + 0.1),
        )  # fmt: skip
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_rules_are_judged_seed_by_seed_against_the_noise():
    # B4 - B1 is 0.001 and -0.001, B3 - B1 is -0.1 and B2 - B1 is 0 twice.
    results = reproduce.Results(
        rows(B1=[0.50, 0.60], B2=[0.50, 0.60], B3=[0.40, 0.50], B4=[0.501, 0.599]), "small"
    )
    judged = {rule: results.judge(rule)[0] for rule in ("B3 < B2", "B3 > B2", "B2 > B1", "B4 = B2")}
    assert list(judged.values()) == ["holds", "does not hold", "within noise", "holds"]
    assert results.judge("B3 = B2")[0] == "does not hold"
    assert results.judge("B3 <= B2")[0] == "holds" and results.judge("B2 <= B3")[0] != "holds"
    assert results.judge("peak(B1) < 0.6")[0] == "holds"
    assert results.judge("B5 > B2")[0] == "not run"
    assert "-0.100" in results.judge("B3 < B2")[1] and "2 seeds" in results.judge("B3 < B2")[1]
    one = reproduce.Results(rows(B1=[0.5], B2=[0.6]), "small")
    assert one.judge("B2 > B1")[0] == "one seed only"


def test_a_row_holds_only_if_all_its_rules_do():
    args = reproduce.parse_args([])
    v1 = next(row for row in reproduce.LEDGER if row.id == "V1")
    better = {f"v{n}": [0.1 * n, 0.1 * n + 0.001] for n in range(2, 8)}
    assert reproduce.verdict(v1, reproduce.Results(rows(**better), "small"), args)[0] == "holds"
    better["v5"] = [0.2, 0.3]
    assert reproduce.verdict(v1, reproduce.Results(rows(**better), "small"), args)[0] != "holds"
    del better["v7"]
    assert reproduce.verdict(v1, reproduce.Results(rows(**better), "small"), args)[0] == "not run"
