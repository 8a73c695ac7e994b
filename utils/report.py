"""`python -m utils.report` is the older name of `python -m reporting`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("reporting", run_name="__main__")
