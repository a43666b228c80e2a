import pytest
import torch
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.patch.directions import adapter_directions
from oneshot.patch.methods import rollback
from oneshot.patch.path import Attempt, Bounds, Reading, Watch
from oneshot.patch.steering import LEAST_STEP, MOST_GUARD, STEP_DECAY, UNDO_GROWTH, UNDO_MOVED, UNDO_RANGE, Course
from oneshot.patch.trace import Tracer


def test_the_watch_steers_guard_noise_and_step():
    """Unsafe: more noise once the example is learnt, the guard back to its weight. Safe but moved: the reverse."""
    recipe, bounds = recipe_of("rollback", noise=0.5, learning_rate=1.0), Bounds()
    attempt = Attempt(Tracer(), 2.0, Watch(lambda: Reading(0, 0, 0, 0), bounds))

    def steered(reading, loss=0.01, weight=6.0, noise=1.0, step=0.5):
        if attempt.watch:
            attempt.watch.last = reading
        after = Course(weight, noise, 0.3, step).after(attempt, recipe, loss, None)
        assert after.undo == 0.3, "there is no guard to go by"
        return after.weight, after.noise, after.step

    shorter, longer = pytest.approx(0.5 * STEP_DECAY), pytest.approx(0.5 / STEP_DECAY)
    unsafe = Reading(margin=-1.0, recovered=0.5, refused=0.0, divergence=0.0)
    assert steered(unsafe) == (4.0, 1.5, longer)
    assert steered(unsafe, loss=0.5) == (4.0, 1.0, longer), "it is not learnt yet"
    assert steered(unsafe, weight=2.5, noise=2.0)[:2] == (2.0, 2.0), "never below the attempt's weight, or above most"
    assert steered(unsafe, step=1.0)[2] == 1.0, "never longer than the recipe's"
    moved = Reading(margin=3.0, recovered=1.0, refused=0.0, divergence=0.05)
    assert steered(moved) == (9.0, pytest.approx(2 / 3), shorter)
    assert steered(moved, weight=MOST_GUARD * 2 - 1, noise=0.6)[:2] == (2 * MOST_GUARD, 0.5), "no more than that"
    assert steered(moved, step=LEAST_STEP)[2] == LEAST_STEP, "it goes on"
    settled = Reading(margin=3.0, recovered=1.0, refused=0.0, divergence=0.004)
    assert steered(settled) == (6.0, 1.0, shorter)
    assert steered(None, weight=2.0) == (2.0, 1.5, longer), "nothing has been looked at"
    attempt.watch = None
    assert steered(None, weight=2.0) == (2.0, 1.5, longer)


def test_the_pull_grows_while_the_guards_prompts_have_moved_little():
    attempt, recipe = Attempt(Tracer(), 1.0), recipe_of("rollback")

    def pull(undo, kl):
        return Course(1.0, 0.5, undo, 0.3).after(attempt, recipe, 1.0, kl).undo

    assert pull(1.0, UNDO_MOVED / 2) == pytest.approx(UNDO_GROWTH)
    assert pull(1.0, UNDO_MOVED * 2) == pytest.approx(1 / UNDO_GROWTH)
    assert [pull(UNDO_RANGE[1], 0.0), pull(UNDO_RANGE[0], 1.0)] == [UNDO_RANGE[1], UNDO_RANGE[0]]
    assert pull(0.0, 0.0) == 0.0, "it is not wanted"


def test_once_requests_are_refused_the_coefficients_move_less_and_less():
    model = tiny_model("llama").requires_grad_(False)
    linears, batch = targets_of(model), tiny_batch(model, 4)
    directions = adapter_directions(tiny_update(linears, scale=0.2), "cpu")
    recipe = recipe_of("rollback", epochs=10, learning_rate=0.02, noise=0.0, undo=0.0)
    last_step = {}
    for recovered in (0.0, 1.0):
        looks = Reading(margin=-1.0, recovered=recovered, refused=0.5, divergence=0.0)
        attempt = Attempt(Tracer(), 0.0, Watch(lambda looks=looks: looks, Bounds()))
        path = rollback.learn(tiny_runtime(), model, directions, batch, attempt, recipe)
        places = [torch.cat([(f.b @ f.a).flatten() for f in update.values()]) for update in path]
        last_step[recovered] = float((places[-1] - places[-2]).norm())
        expected = max(LEAST_STEP, STEP_DECAY**9) if recovered else 1.0
        assert attempt.tracer.records[-1]["step"] == pytest.approx(0.02 * expected)
    assert last_step[1.0] < 0.6 * last_step[0.0]
