# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, from a sample of its sources: measured, scaled up, with a range.

`planning` is the whole way, `sample_run` runs and measures, `bootstrap` scales up and makes ranges,
`cluster_time` turns work into time; `kept_plan` keeps the outcome, `comparison` holds a run against it.
"""

from dataengine.forecast.comparison import Comparison, compare
from dataengine.forecast.kept_plan import load, store
from dataengine.forecast.planning import make_forecast, parse_cluster
from dataengine.forecast.result import Forecast, Range, StagePlan, range_text
from dataengine.forecast.table import show

__all__ = [
    "Comparison",
    "Forecast",
    "Range",
    "StagePlan",
    "compare",
    "load",
    "make_forecast",
    "parse_cluster",
    "range_text",
    "show",
    "store",
]
