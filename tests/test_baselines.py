"""What needs no training, against what is known: on spaces that can be enumerated."""
import pytest
import torch

import baselines
from diffusion import Absorbing
from exact import chi_square, kl, posterior_table, random_law, rank, sequences
from rewards import TASKS, Task


class Small(Task):
    alphabet, length = "AB", 4

    def reward(self, samples):
        return torch.linspace(0, 3, 16)[rank(self.encode(samples), 2)]


def setting(n=4000):
    """A consistent model of three positions and two letters; a reward; prompts without a letter."""
    torch.manual_seed(0)
    process, model = Absorbing(2), posterior_table(random_law(2, 3), 2, 3)
    reward = torch.randn(8).double()
    return process, model, torch.full((n, 3), 2), reward, lambda x: reward[rank(x, 2)]


def test_best_of_n_has_the_distribution_of_the_largest_reward():
    process, model, prompt, reward, of = setting()
    law, order = process.exact_law(model, 3).detach(), reward.argsort()
    reached = law[order].cumsum(dim=0).pow(4)                   # P(best of 4 <= r)
    expected = torch.zeros(8).double()
    expected[order] = reached.diff(prepend=torch.zeros(1))
    tokens = baselines.best_of(process, model, prompt, of, 4)
    assert chi_square(tokens, expected, 2) > 1e-4


def test_smc_and_svdd_leave_the_prompt_and_raise_the_reward():
    process, model, prompt, reward, of = setting(1000)
    prompt[:, 1] = 0
    plain = of(process.sample(model, 1000, 3, prompt)[0]).mean()
    best = reward[sequences(2, 3)[:, 1] == 0].max()
    for tokens in (baselines.svdd(process, model, prompt, of, 8, 0.05),
                   baselines.smc(process, model, prompt, of, 0.05)):
        assert (tokens[:, 1] == 0).all() and (tokens < 2).all()
        assert of(tokens).mean() > plain + 0.7 * (best - plain)


@pytest.mark.parametrize("alpha", [2.0, 0.35])
def test_smc_draws_from_the_tilted_distribution(alpha):
    """At 0.35 its particles are resampled on the way."""
    process, model, prompt, reward, of = setting(20_000)
    law = process.exact_law(model, 3).detach() * (reward / alpha).exp()
    tokens = baselines.smc(process, model, prompt, of, alpha)
    found = torch.bincount(rank(tokens, 2), minlength=8) / 20_000
    assert (found - law / law.sum()).abs().max() < 0.02


def test_the_kl_of_a_way_on_a_small_space_is_that_of_its_distribution():
    """Here of samples of the optimum at beta 0.7, whose mean reward p* has at this KL, too."""
    torch.manual_seed(0)
    process, model = Absorbing(2), posterior_table(random_law(2, 4), 2, 4)
    p_ref, R = process.exact_law(model, 4).detach(), torch.linspace(0, 3, 16).double()
    best = (p_ref.log() + R / 0.7).softmax(dim=0)
    mean, kl_, at_kl = baselines.small_space(
        process, model, Small(), lambda _: sequences(2, 4)[best.multinomial(5000, True)], runs=20)
    assert mean == pytest.approx((best * R).sum().item(), abs=0.02)
    assert kl_ == pytest.approx(kl(best, p_ref), abs=0.02)
    assert at_kl == pytest.approx(mean, abs=0.03)


def test_the_genetic_algorithm_queries_nothing_twice_and_finds_the_best():
    task = TASKS["toy"]()
    tokens, values = baselines.genetic_algorithm(task, 800, seed=0)
    assert len(tokens.unique(dim=0)) == 800 == len(values) and values.max() == 0.75
