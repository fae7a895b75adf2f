"""A kernel module whose import never ends."""

from tests.engines.test_end_with_parent import note_and_sleep

note_and_sleep()
