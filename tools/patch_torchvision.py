"""Make torchvision's CUDA wheel importable beside a CPU build of torch: declare the two operators that it looks up.

Run once with the environment's own Python.
"""

import importlib.util
from pathlib import Path

MARK = "# operators declared for a torch without CUDA"
DECLARATIONS = f"""

{MARK}
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _declared.define(_operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

spec = importlib.util.find_spec("torchvision")
if spec is None or spec.origin is None:
    raise SystemExit("torchvision is not installed in this environment")
extension = Path(spec.origin).with_name("extension.py")
source = extension.read_text(encoding="utf-8")
if MARK not in source:
    extension.write_text(source + DECLARATIONS, encoding="utf-8")
