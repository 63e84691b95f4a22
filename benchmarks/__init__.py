import time

BEGAN = time.monotonic()  # before torch is imported
