"""Losses and token helpers under the names and signatures of other libraries; a trainer changes one import.

`lightly`, `solo` (solo-learn), `pytorch_metric_learning` and `mae` are modules of their own; none of them imports the
library that it stands in for. docs/compat.md says what maps to what and where results differ on purpose.
"""
