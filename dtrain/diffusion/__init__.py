"""Processes and how to walk them: no parameters, no files, no draws. Begin with `gaussian.py`, `flow.py` or `edm.py`.

    schedule.py, gaussian.py, flow.py, edm.py   levels α_t and σ_t, x_t, what outputs say of x_0 and ε (prediction.py)
    gamma.py, gamma_law.py                      gamma noise in the place of normal noise
    times.py                                    which levels training visits
    likelihood.py                               the variational bound, term by term
    samplers.py, solvers.py                     from noise to images;  guidance.py: towards a condition

Tables are float64 and proven on closed forms. What training descends stands in `dtrain/objectives`.
"""
