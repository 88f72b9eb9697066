"""What may make a step faster: each is off until it is asked for, or a record speaks for it.

`check_settings` refuses what no machine can do, `check_machine` what this one cannot, and
`make_faster` does what the settings ask for to a model that is built.
"""

from training.speed.choices import check_machine, check_settings, make_faster, obstacles

__all__ = ["check_machine", "check_settings", "make_faster", "obstacles"]
