import io
import json
import math

import pytest
import torch
from rich.console import Console
from tiny import targets_of, tiny_model, tiny_runtime

from oneshot import spectrum as stage
from oneshot.data.encoding import encode
from oneshot.errors import UserError
from oneshot.patch import spectrum
from oneshot.patch import summed as summed_up
from oneshot.report import spectrum as report
from oneshot.report import spectrum_figures
from oneshot.report.spectrum_medians import energy_at, medians
from oneshot.settings import SpectrumSettings as options
from oneshot.training.objective import cross_entropy_sum
from oneshot.world import language
from oneshot.world.model import ALIGNED, build_tokenizer

FAMILIES = ("llama", "qwen2", "gemma3", "phi")
K = 4
FILES = ("data.harmful", "guard", "pool")


def conversations(count=8):
    tokenizer = build_tokenizer()
    pool = [encode(row, tokenizer, 64) for row in language.pool(count + 1)]
    harmful = [encode(row, tokenizer, 64) for row in language.harmful_data(3, 0)]
    return pool[0], {"safety": pool[1:], "harmful": harmful}


def gradient(model, linears, row):
    """dL/dW of one conversation's mean cross entropy, as autograd makes it."""
    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    loss = cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, labels) / row.answer_tokens()
    found = dict(zip(linears, torch.autograd.grad(loss, weights)))
    model.requires_grad_(False)
    return found


def cosine(first, second):
    dot = sum((first[name] * second[name]).sum() for name in first)
    norms = [sum(one.square().sum() for one in found.values()).sqrt() for found in (first, second)]
    return float(dot / norms[0] / norms[1])


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """The spectrum from factors, and the gradients of the example and of every conversation, materialized, in fp64."""
    model = tiny_model(request.param).double().requires_grad_(False)
    linears = targets_of(model)
    example, groups = conversations()
    found = spectrum.measure(tiny_runtime(), model, linears, example, groups, 0, options(rank=K, batch_size=3))
    own = gradient(model, linears, example)
    each = {group: [gradient(model, linears, row) for row in rows] for group, rows in groups.items()}
    return found, own, each


def summed(gradients):
    return {name: sum(one[name] for one in gradients) for name in gradients[0]}


def test_singular_values_are_those_of_the_gradient(both):
    found, own, _ = both
    assert [matrix.name for matrix in found.matrices] == list(own)
    for matrix in found.matrices:
        s = torch.linalg.svdvals(own[matrix.name])
        assert matrix.shape == tuple(own[matrix.name].shape)
        assert matrix.rank == int(torch.linalg.matrix_rank(own[matrix.name]))
        assert len(matrix.singular_values) == matrix.rank <= 20
        assert matrix.singular_values == pytest.approx(s[: matrix.rank].tolist(), rel=1e-6, abs=1e-9 * float(s[0]))
        assert matrix.norm == pytest.approx(float(own[matrix.name].norm()), rel=1e-6)


def test_effective_rank_and_directions_follow_from_them(both):
    found, own, _ = both
    for matrix in found.matrices:
        s = torch.linalg.svdvals(own[matrix.name])
        share = s[s > 0] / s.sum()
        assert matrix.effective_rank == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-6)
        energy = s.square().cumsum(0) / s.square().sum()
        for wanted, k in ((0.9, matrix.directions_90), (0.99, matrix.directions_99)):
            assert energy[k - 1] >= wanted
            assert k == 1 or energy[k - 2] < wanted
        assert energy_at(matrix, 3) == pytest.approx(float(energy[2]), rel=1e-6)


def test_cosines_are_those_of_the_summed_gradients_and_of_each(both):
    found, own, each = both
    for group, gradients in each.items():
        whole = summed(gradients)
        assert found.cosines[group] == pytest.approx(cosine(own, whole), rel=1e-6)
        assert found.each[group] == pytest.approx([cosine(own, one) for one in gradients], rel=1e-6)
        for matrix in found.matrices:
            one, other = own[matrix.name], whole[matrix.name]
            assert matrix.norms[group] == pytest.approx(float(other.norm()) / len(gradients), rel=1e-6)
            dot = float((one * other).sum() / one.norm() / other.norm())
            assert matrix.cosines[group] == pytest.approx(dot, rel=1e-6, abs=1e-9)


def test_overlaps_are_those_of_the_leading_singular_vectors(both):
    found, own, each = both
    whole = summed(each["safety"])
    for matrix in found.matrices:
        (u, _, vt), (u2, _, vt2) = (torch.linalg.svd(g[matrix.name]) for g in (own, whole))
        assert matrix.compared == (K, K)
        left = float((u[:, :K].T @ u2[:, :K]).square().sum()) / K
        right = float((vt[:K] @ vt2[:K].T).square().sum()) / K
        assert (matrix.overlap_left, matrix.overlap_right) == pytest.approx((left, right), rel=1e-6)
        m, n = matrix.shape
        assert (matrix.chance_left, matrix.chance_right) == (K / m, K / n)


def test_random_subspaces_overlap_as_much_as_chance_says():
    torch.manual_seed(0)
    drawn = [
        spectrum.overlap(*(torch.linalg.qr(torch.randn(40, k, dtype=torch.float64)).Q for k in (3, 8)))
        for _ in range(400)
    ]
    directions = [spectrum.decomposed((torch.randn(k, 30), torch.randn(k, 40))) for k in (3, 8)]
    assert sum(drawn) / len(drawn) == pytest.approx(spectrum._compared(*directions, 20)["chance_left"], rel=0.05)


def test_a_subspace_within_another_overlaps_wholly():
    eye = torch.eye(9)
    assert spectrum.overlap(eye[:, :2], eye[:, :5]) == 1.0
    assert spectrum.overlap(eye[:, :2], eye[:, 2:5]) == 0.0


def test_fewer_directions_than_asked_for_are_compared_where_there_are_fewer():
    model = tiny_model("llama").requires_grad_(False)
    example, groups = conversations(2)
    found = spectrum.measure(tiny_runtime(), model, targets_of(model), example, groups, 0, options())
    for matrix in found.matrices:
        assert matrix.compared[0] == matrix.rank < 20
        assert matrix.rank <= matrix.compared[1] <= min(20, *matrix.shape)


@pytest.mark.parametrize(("rank", "why"), [(21, "the example has 20 tokens"), (33, "the example has 20 tokens")])
def test_more_directions_than_the_example_has_are_refused(rank, why):
    model = tiny_model("llama").requires_grad_(False)
    example, groups = conversations(2)
    assert len(example.input_ids) == 20
    with pytest.raises(UserError, match=rf"spectrum\.rank asks for {rank} .* at most 20 \({why}\): give 20 or less"):
        spectrum.measure(tiny_runtime(), model, targets_of(model), example, groups, 0, options(rank=rank))


def test_a_matrix_smaller_than_the_example_bounds_the_rank():
    model = tiny_model("llama")
    linears = targets_of(model, "k_proj")
    with pytest.raises(UserError, match=r"at most 16 \(the largest matrix has rank 16\)"):
        spectrum.check_rank(17, "repair.rank", conversations()[0], linears)


def test_a_gradient_of_zero_has_no_rank():
    zero = spectrum.decomposed((torch.randn(5, 8), torch.zeros(5, 6)))
    matrix = spectrum._matrix("a", zero)
    assert (matrix.rank, matrix.norm, matrix.singular_values) == (0, 0.0, [])
    assert spectrum._compared(zero, zero, 3) == {}
    found = medians([matrix], ["harmful"])
    assert found["matrices"] == 0
    assert math.isnan(found["cosines"]["harmful"])


def test_factors_stay_within_twice_the_smaller_side():
    model = tiny_model("llama").double().requires_grad_(False)
    linears, rows = targets_of(model), conversations(8)[1]["safety"]
    gradients = spectrum.Gradients(linears)
    with gradients.capturing(model):
        held = summed_up.gradient_factors(tiny_runtime(), model, gradients, rows, 0, batch_size=2)
    whole = summed([gradient(model, linears, row) for row in rows])
    for name, (x, delta) in held.items():
        m, n = whole[name].shape
        assert len(x) == len(delta) <= 2 * min(m, n) < sum(len(row.input_ids) for row in rows)
        torch.testing.assert_close(delta.T @ x, whole[name], rtol=1e-9, atol=1e-9 * float(whole[name].abs().max()))


# what is written


def facts(**changed):
    return {
        "model": "m", "world_size": 1, "seed": 0, "example": {"id": "e", "prompt": "<b>p</b>", "response": "r"},
        "groups": {"harmful": 2}, "notes": ["a note"], "seconds": 1.0, "versions": {"torch": "2"}, **changed,
    }  # fmt: skip


def made(layers=3, modules=("self_attn.q_proj", "mlp.up_proj")):
    """A spectrum of made-up numbers; one matrix has no gradient, and none of the groups a cosine with it."""
    matrices = [
        spectrum.Matrix(
            f"model.layers.{layer}.{module}", (8, 6), 3, 2.0, [1.5, 1.2, 0.1], 2.2 + layer, 2, 2, (3, 3), 0.5, 0.25,
            0.375, 0.5, {"harmful": 1.0}, {"harmful": -0.5 + 0.1 * layer},
        )
        for layer in range(layers)
        for module in modules
    ]  # fmt: skip
    matrices.append(spectrum.Matrix("model.layers.0.odd", (8, 6), 0, 0.0, [], 0.0, 0, 0, cosines={"harmful": math.nan}))
    return spectrum.Spectrum(matrices, {"harmful": -0.4}, {"harmful": [-0.3, math.nan]})


SWEEP = [
    {
        "rank": rank, "alpha": alpha, "step": 0.1 * alpha, "energy": 0.5, "loss": 1 / rank / alpha,
        "others_loss": loss, "guard_kl": 0.0,
    }
    for rank in (1, 20)
    for alpha, loss in ((0.5, 3.0), (2.0, math.nan))
]  # fmt: skip


def test_json_and_page_hold_everything_and_read_back(tmp_path):
    page = report.write_spectrum(tmp_path, made(), facts(), SWEEP).read_text()
    whole = json.loads((tmp_path / "spectrum.json").read_text())
    assert whole["matrices"][0]["singular_values"] == [1.5, 1.2, 0.1]
    assert whole["matrices"][-1]["cosines"] == {"harmful": None}
    assert whole["cosines_each"] == {"harmful": [-0.3, None]}
    assert whole["sweep"][1]["others_loss"] is None
    assert whole["summary"]["overlap_left"] == 0.5
    assert page.count("<svg") == 5
    assert "&lt;b&gt;p" in page
    assert "<b>p" not in page
    assert "a note" in page
    again = report.read_spectrum(tmp_path)
    assert again is not None
    assert again.count("<svg") == 5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"matrices": [{"name": 1}]}', '{"matrices": 3}'])
def test_another_file_of_that_name_is_left_alone(tmp_path, text):
    (tmp_path / "spectrum.json").write_text(text)
    assert report.read_spectrum(tmp_path) is None


def test_without_groups_and_sweep_the_page_has_the_rest(tmp_path):
    example, _ = conversations()
    model = tiny_model("llama").requires_grad_(False)
    found = spectrum.measure(tiny_runtime(), model, targets_of(model), example, {}, 0, options())
    page = report.write_spectrum(tmp_path, found, facts(groups={}, notes=[]), []).read_text()
    assert page.count("<svg") == 2, "energy and heat map"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "self_attn.q_proj")),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", (0, "mlp.dense_h_to_4h")),
        ("model.layers.2.mlp.experts.7.w1", (2, "mlp.experts.*.w1")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_names_are_taken_apart(name, wanted):
    assert report.module_of(name) == wanted


def test_console_tables_name_every_module_and_the_best_step():
    stream = io.StringIO()
    console = Console(width=100, file=stream)
    console.print(report.console_table(made()))
    console.print(report.sweep_table(SWEEP))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["q_proj", "3", "3.2", "2", "2", "0.38", "0.44", "-0.400"] in lines
    assert ["20", "0.500", "0.5", "0.1000", "3.0000", "0.0000"] in lines


def test_the_stage_measures_a_model_by_its_path(tmp_path, capsys):
    rows = {"harmful": language.harmful_data(4, 0), "guard": language.guard_prompts(4), "pool": language.pool(6)}
    for name, found in rows.items():
        lines = [json.dumps({"id": row.id, "kind": row.kind, "messages": list(row.messages)}) for row in found]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = {f"--{option}": str(tmp_path / f"{option.rpartition('.')[2]}.jsonl") for option in FILES}
    out = tmp_path / "run"
    common = ["--model.path", str(ALIGNED), "--select", "hardest", *(part for pair in files.items() for part in pair)]
    stage.main([*common, "--spectrum.sweep", "true", "--spectrum.ranks", "[1,20]", "--out", str(out)])
    whole = json.loads((out / "spectrum.json").read_text())
    assert whole["example"]["id"] in {row.id for row in rows["pool"]}
    assert whole["groups"] == {"safety": 5, "harmful": 4, "guard": 4}
    assert len(whole["matrices"]) == 21
    assert {row["rank"] for row in whole["sweep"]} == {1, 20}
    assert (out / "spectrum.html").is_file()
    assert (out / "settings.yaml").is_file()
    assert "down_proj" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        stage.main([*common, "--spectrum.ranks", "[0]", "--out", str(tmp_path / "other")])
    assert left.value.code == 2
    assert "spectrum.ranks is [0]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stage.main([*common, "--data.harmful", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "other")])
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_large_model_is_drawn_without_numbers():
    modules = ("q", "k", "v", "o", "gate", "up", "down")
    cells = {(layer, module): 1.0 + layer for layer in range(80) for module in modules}
    svg = spectrum_figures.heat_map(cells)
    assert "from 1.0 (pale) to 80.0" in svg
    assert svg.count("80.0") == 1
    assert "7.0" in spectrum_figures.heat_map({(0, "q"): 7.0})
    assert spectrum_figures.heat_map({(None, "lm_head"): 1.0}) == ""
    for draw in (spectrum_figures.energy, spectrum_figures.sweep_figure):
        assert draw([]) == ""
    for draw in (spectrum_figures.cosines, spectrum_figures.overlaps):
        assert draw({}) == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 12])
def test_the_sweep_is_drawn_for_any_number_of_ranks(ranks):
    """0.2 + 0.8 * 3 / 3 is more than 1 in floating point, and no alpha of matplotlib's."""
    rows = [
        {"rank": rank, "alpha": alpha, "loss": 0.5, "others_loss": 0.4, "guard_kl": 0.01}
        for rank in range(1, ranks + 1)
        for alpha in (0.5, 1.0)
    ]
    assert f"k = {ranks}" in spectrum_figures.sweep_figure(rows)
