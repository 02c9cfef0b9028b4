"""Run the Python blocks of Markdown files, each on its own: `run_blocks.py README.md ...`."""

import re
import sys
from pathlib import Path

import pyrocurv

print(f"pyrocurv {pyrocurv.__version__} in {Path(pyrocurv.__file__).parent}")
for name in sys.argv[1:]:
    blocks = re.findall(r"^```python\n(.*?)^```", Path(name).read_text(), re.DOTALL | re.MULTILINE)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), {})
    print(f"{name}: {len(blocks)} blocks run")
