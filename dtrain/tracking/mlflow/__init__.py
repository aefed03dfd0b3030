"""Ships the journal to MLflow: the only package that knows MLflow (design, decision 6).

A thread reads the run's journals and sends their valid lines with their own timestamps. Training never waits for it: a
server that is slow, away or broken only makes the thread try again. What is sent depends on what is there: a metric key
goes on after the highest step that MLflow holds of it, so neither a restart, nor an attempt that goes through old steps
again, nor an answer lost on the way doubles anything. Evaluations come in any order, so of their keys the whole history
is asked. What is left when the run ends is shipped by `sync`.

    event "train", metric "loss"                                  train/loss
    event "eval", context {"ema": "0.999", "n": 2000}             eval/0.999/n2000/fd_pixels
                  and "differs": {"steps": 250}                   eval/0.999/n2000/steps-250/fd_pixels
    event "system", context {"node": "0", "sample": 7}            system/0/<metric>, at step 7
    event "checkpoint"                                            also a logged model, with the metrics of its step
    event "sweep"                                                 a child run of the run's sweep
    `dtrain compare`                                              a run of its own (comparisons.py)
    any other event                                               <event>/<metric>
Files that an event's context names as `artifact` or `artifacts` (relative to the run directory) are uploaded under the
same path; the picture of an evaluation as an image of its step.
"""

from dtrain.tracking.mlflow.address import default_uri, tracking_uri
from dtrain.tracking.mlflow.comparisons import send_comparison
from dtrain.tracking.mlflow.link import curves_link, problem, server_command
from dtrain.tracking.mlflow.run import Destination
from dtrain.tracking.mlflow.shipper import Shipper, sync

__all__ = [
    "Destination",
    "Shipper",
    "curves_link",
    "default_uri",
    "problem",
    "send_comparison",
    "server_command",
    "sync",
    "tracking_uri",
]
