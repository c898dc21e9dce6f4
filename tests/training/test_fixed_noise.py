"""Students whose steps add the initial noise again: training, sampling, and no export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import DDPM_WORLD, FLOW_WORLD, make_batch
from workdirs import make_workdir

from gadjax import load
from gadjax.cli.main import main
from gadjax.diffusion.samplers import same_noise
from gadjax.objectives import DMD
from gadjax.pipelines.sampling import sampler_and_times
from gadjax.training.backward_simulation import backward_simulate, stratified_step_indices


@pytest.mark.parametrize("world", [FLOW_WORLD, DDPM_WORLD], ids=["flow", "ddpm"])
@pytest.mark.parametrize("samples", [8, 7], ids=["pairs", "alone"])
def test_a_drawn_step_starts_at_the_last_x0_with_the_first_noise(world, samples):
    """alpha x0 + sigma z of the step before, for every step, and x0 at the end."""
    batch, student = make_batch(samples), world.student_params(bend=0.3)
    step_spec = world.step_spec(DMD(), rollout="fixed_noise")
    step_B = stratified_step_indices(batch.stratum, 4)

    @jax.jit
    def run(student):
        latents, x = [batch.noise], batch.noise
        for start, end in zip(world.times[:-1], world.times[1:], strict=True):
            x0 = world.denoiser(student, x, jnp.full(samples, start), batch.cond).x0
            alpha, sigma = (float(v) for v in world.schedule.alpha_sigma(np.float64(end)))
            x = alpha * x0 + sigma * batch.noise
            latents.append(x)

        def predict(x, t):
            return world.denoiser(student, x, jnp.broadcast_to(t, samples), batch.cond)

        sampled = same_noise(predict, world.schedule, batch.noise, jnp.array(world.times))
        drawn = backward_simulate(step_spec, student, batch, step_B)
        return jnp.stack(latents[:-1])[step_B, jnp.arange(samples)], drawn, x0, sampled

    expected, drawn, x0, sampled = jax.device_get(run(student))
    np.testing.assert_allclose(drawn, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(sampled, x0, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_its_workdir_is_sampled_so_and_not_exported(tiny_pipeline, tmp_path, capsys):
    student = {"rollout": "fixed_noise"}
    workdir = make_workdir(tmp_path / "run", tiny_pipeline, student=student)
    model = load(str(workdir))
    sampler, times = sampler_and_times(model.pipeline, model.sampling)
    assert sampler.sample_fn is same_noise and times[:-1].tolist() == [899, 674, 449, 224]
    assert main(["export", "--workdir", str(workdir), "--out", str(tmp_path / "out")]) == 2
    assert "student.rollout: found 'fixed_noise'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
