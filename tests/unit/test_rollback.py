import pytest
import torch
from tiny import FAMILIES, recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import INDEX, SINGLE
from oneshot.errors import UserError
from oneshot.patch import directions as of_update
from oneshot.patch.attach import attached
from oneshot.patch.guard import repair_loss
from oneshot.patch.method import finished
from oneshot.patch.methods import rollback
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer
from oneshot.patch.undoing import MAX_COEFFICIENT

GUARD_WEIGHT = 1.0


def finetuned(aligned, family, scale=0.1):
    """The same model after a dense, full-rank change of every weight."""
    model = tiny_model(family)
    model.load_state_dict(aligned.state_dict())
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(family) -> aligned and fine-tuned models and their folders, one sharded, one a single file; made once."""
    made = {}

    def of(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            aligned = tiny_model(family)
            tuned = finetuned(aligned, family)
            reference = saved(aligned, root / "aligned", max_shard_size="15KB")
            checkpoint = saved(tuned, root / "tuned")
            assert (reference / INDEX).is_file()
            assert (checkpoint / SINGLE).is_file()
            made[family] = aligned, tuned, reference, checkpoint
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_one_undo_and_zero_keep(family, folders):
    aligned, tuned, reference, checkpoint = folders(family)
    linears, wanted = targets_of(tuned), targets_of(aligned)
    difference = of_update.checkpoint_difference(checkpoint, reference, linears)
    directions = of_update.shared_directions(tiny_runtime(), linears, 10_000, difference)
    assert set(directions) == set(linears)
    for name, module in linears.items():
        d = directions[name]
        assert len(d.s) == min(module.weight.shape)
        assert (module.weight - wanted[name].weight).norm() > 0.1
        undone, kept = (of_update.update_factors(d, -c * torch.ones(len(d.s))) for c in (1.0, 0.0))
        torch.testing.assert_close(module.weight + undone.b @ undone.a, wanted[name].weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.weight + kept.b @ kept.a, module.weight, rtol=0, atol=0)


def test_undoing_through_the_hooks_gives_the_aligned_logits(folders):
    aligned, tuned, reference, checkpoint = folders("qwen2")
    model = tiny_model("qwen2")
    model.load_state_dict(tuned.state_dict())
    linears = targets_of(model)
    with torch.no_grad():  # everything that is no target, as in the aligned model
        for (name, parameter), other in zip(model.named_parameters(), aligned.parameters()):
            if name.removesuffix(".weight") not in linears:
                parameter.copy_(other)
    difference = of_update.checkpoint_difference(checkpoint, reference, linears)
    directions = of_update.shared_directions(tiny_runtime(), linears, 10_000, difference)
    update = {name: of_update.update_factors(d, -torch.ones(len(d.s))) for name, d in directions.items()}
    tokens = torch.arange(10, 22)[None]
    wanted = aligned(input_ids=tokens).logits
    assert (model(input_ids=tokens).logits - wanted).abs().max() > 0.1
    with attached(linears, update):
        torch.testing.assert_close(model(input_ids=tokens).logits, wanted, rtol=1e-3, atol=1e-3)


def coefficient_loss(model, linears, directions, batch, flat, kept):
    sizes = [len(directions[name].s) for name in linears]
    update = {
        name: of_update.update_factors(directions[name], 1 - c if kept else -c)
        for name, c in zip(linears, flat.split(sizes))
    }
    with attached(linears, update):
        return repair_loss(model, batch, GUARD_WEIGHT, 1)[0]


@pytest.mark.parametrize("kept", [False, True], ids=["checkpoint", "adapter"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt_neox"])
def test_coefficient_gradients_equal_finite_differences(family, kept):
    model = tiny_model(family).requires_grad_(False)
    linears = targets_of(model)
    batch = tiny_batch(model, 2)
    model.double()
    found = of_update.adapter_directions(tiny_update(linears, scale=0.3), "cpu")
    directions = {
        name: of_update.Directions(d.u.double(), d.s.double(), d.vt.double(), d.energy) for name, d in found.items()
    }
    size = sum(len(d.s) for d in directions.values())
    torch.manual_seed(0)
    flat = (0.2 + 0.5 * torch.rand(size, dtype=torch.float64)).requires_grad_(True)
    loss = coefficient_loss(model, linears, directions, batch, flat, kept)
    (gradient,) = torch.autograd.grad(loss, flat)

    step = 3e-3  # the loss itself is fp32
    with torch.no_grad():
        for place in range(0, size, 3):
            shift = torch.zeros(size, dtype=torch.float64)
            shift[place] = step
            high, low = (
                coefficient_loss(model, linears, directions, batch, flat + sign * shift, kept) for sign in (1, -1)
            )
            assert float(high - low) / (2 * step) == pytest.approx(float(gradient[place]), rel=2e-2, abs=2e-3)
    assert gradient.abs().max() > 0.1


def test_solve_learns_from_example_and_guard():
    """Coefficients move only as far as they may, lower the example's loss, and the guard holds the KL down."""
    model = tiny_model("llama").requires_grad_(False)
    linears, batch = targets_of(model), tiny_batch(model, 4)
    directions = of_update.adapter_directions(tiny_update(linears, scale=0.2), "cpu")
    results = {}
    for weight in (0.0, 20.0):
        tracer = Tracer()
        recipe = recipe_of("rollback", epochs=12, learning_rate=0.1, noise=0.0, undo=0.0)
        path = rollback.learn(tiny_runtime(), model, directions, batch, Attempt(tracer, weight), recipe)
        weights, unreached = finished(path)
        assert not unreached
        assert list(weights) == list(linears)
        assert all(w.min() >= -MAX_COEFFICIENT and w.max() <= 0 for w in weights.values())
        update = {n: of_update.update_factors(directions[n], w) for n, w in weights.items()}
        with attached(linears, update):
            _, example, kl = repair_loss(model, batch, weight, 1)
        results[weight] = float(example), float(kl)
    start = float(repair_loss(model, batch, 0.0, 1)[1])
    assert results[0.0][0] < 0.9 * start
    assert results[20.0][1] < 0.5 * results[0.0][1]


def test_solve_stops_on_a_loss_that_is_no_number():
    from oneshot.training.loop import Diverged

    model = tiny_model("llama").requires_grad_(False)
    linears, batch = targets_of(model), tiny_batch(model)
    directions = of_update.adapter_directions(tiny_update(linears), "cpu")
    next(iter(linears.values())).weight[0, 0] = float("nan")
    path = rollback.learn(tiny_runtime(), model, directions, batch, Attempt(Tracer()), recipe_of("rollback", epochs=2))
    with pytest.raises(Diverged, match="epoch 1"):
        next(path)


def assert_svd(d, product):
    eye = torch.eye(len(d.s))
    torch.testing.assert_close(d.u.T @ d.u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(d.vt @ d.vt.T, eye, rtol=0, atol=1e-5)
    assert (d.s.diff() <= 0).all()
    torch.testing.assert_close((d.u * d.s) @ d.vt, product, rtol=1e-4, atol=1e-4)
    assert d.energy == pytest.approx(float(product.square().sum()), rel=1e-4)


def test_adapter_directions_decompose_the_adapters_own_update():
    model = tiny_model("llama")
    update = tiny_update(targets_of(model), ranks=(1, 3, 8))
    directions = of_update.adapter_directions(update, "cpu")
    assert set(directions) == set(update)
    for name, factors in update.items():
        assert len(directions[name].s) == factors.rank
        assert_svd(directions[name], factors.b @ factors.a)


@pytest.mark.parametrize(("m", "n", "k"), [(6, 20, 9), (20, 6, 9), (8, 8, 12)])
def test_adapter_directions_of_a_rank_above_the_layers_size(m, n, k):
    torch.manual_seed(0)
    factors = Factors(torch.randn(m, k), torch.randn(k, n))
    d = of_update.adapter_directions({"x": factors}, "cpu")["x"]
    assert d.u.shape[1] == len(d.s) == d.vt.shape[0]
    assert_svd(d, factors.b @ factors.a)


def test_randomized_decomposition_agrees_with_the_exact_one():
    torch.manual_seed(0)
    m, n, rank = 600, 700, 10
    scales = torch.linspace(10.0, 1.0, rank)
    u, v = (torch.linalg.qr(torch.randn(size, rank))[0] for size in (m, n))
    delta = (u * scales) @ v.T + 1e-3 * torch.randn(m, n)
    assert min(delta.shape) > of_update._EXACT_UP_TO
    d = of_update.decompose(delta, rank)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(d.s, s[:rank], rtol=1e-3, atol=1e-4)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert ((d.u * d.s) @ d.vt - best).norm() < 1e-3 * best.norm()
    assert d.energy == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert 0 < 1 - float(d.s.square().sum()) / d.energy < 0.01  # the noise is what is left

    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = of_update.decompose(delta, rank)
    assert torch.equal(again.u, d.u)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"


def test_exact_decomposition_keeps_the_top_directions():
    torch.manual_seed(0)
    delta = torch.randn(40, 30)
    d = of_update.decompose(delta, 7)
    s = torch.linalg.svdvals(delta)
    torch.testing.assert_close(d.s, s[:7])
    residual = delta - (d.u * d.s) @ d.vt
    assert float(residual.norm()) == pytest.approx(float(s[7:].norm()), rel=1e-4)
    assert d.energy == pytest.approx(float(delta.square().sum()), rel=1e-5)


@pytest.mark.parametrize("sharded", ["reference", "model"])
def test_checkpoint_difference_reads_both_kinds_of_folder(sharded, folders):
    aligned, tuned, first, second = folders("llama")
    if sharded == "model":
        first, second, aligned, tuned = second, first, tuned, aligned
    linears = targets_of(tuned)
    difference = of_update.checkpoint_difference(second, first, linears)
    for name, module in linears.items():
        wanted = module.weight - targets_of(aligned)[name].weight
        torch.testing.assert_close(difference(name, True), wanted.detach(), rtol=0, atol=0)
        assert difference(name, False) is None


def test_checkpoint_difference_of_bf16_is_taken_in_fp32(tmp_path):
    model = tiny_model("llama")
    other = finetuned(model, "llama", scale=1e-3)
    paths = saved(model.bfloat16(), tmp_path / "a"), saved(other.bfloat16(), tmp_path / "b")
    linears = targets_of(model)
    difference = of_update.checkpoint_difference(paths[1], paths[0], linears)
    name = next(iter(linears))
    wanted = targets_of(other)[name].weight.float() - linears[name].weight.float()
    assert difference(name, True).dtype == torch.float32
    torch.testing.assert_close(difference(name, True), wanted.detach(), rtol=0, atol=0)


def test_another_shape_is_refused_by_name(folders, tmp_path):
    _, tuned, _, checkpoint = folders("llama")
    wide = saved(tiny_model("llama", intermediate_size=64), tmp_path / "wide")
    with pytest.raises(UserError, match=r"wide has model\.layers\.0\.mlp\.\w+\.weight of shape \[.*64.*\], the model"):
        of_update.checkpoint_difference(checkpoint, wide, targets_of(tuned))


def test_a_missing_module_is_refused_by_name(folders, tmp_path):
    _, tuned, _, checkpoint = folders("llama")
    short = saved(tiny_model("llama", num_hidden_layers=1), tmp_path / "short")
    with pytest.raises(UserError, match=r"short holds no weight for model\.layers\.1\."):
        of_update.checkpoint_difference(checkpoint, short, targets_of(tuned))
