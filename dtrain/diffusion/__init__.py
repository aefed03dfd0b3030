"""Processes and how to walk them: no parameters, no files, no draws. Begin with `gaussian.py`, `flow.py` or `edm.py`.

    schedule.py, gaussian.py, flow.py, edm.py   levels α_t and σ_t, x_t, what outputs say of x_0 and ε (prediction.py)
    gamma.py, gamma_law.py                      gamma noise in the place of normal noise
    variational.py                              a process told by its γ, which may be learned
    mean_flow.py, denoising_gan.py              few steps: mean velocities, a short chain whose x_0 is drawn
    times.py                                    which levels training visits
    likelihood.py, variational_bound.py         the variational bound, term by term
    ode_likelihood.py                           the exact density of a flow
    samplers.py, solvers.py, resampled.py       from noise to images;  guidance.py: towards a condition

Tables are float64 and proven on closed forms. What training descends stands in `dtrain/objectives`.
"""
