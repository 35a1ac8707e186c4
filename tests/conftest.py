"""What every test starts from."""

import signal

# A shell starts its background jobs with SIGINT ignored, and their children inherit that: the tests' processes would
# not hear the interrupts that the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
