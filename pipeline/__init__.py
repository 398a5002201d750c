"""pipeline: torch. One command is one module is one function of the same name.

Its files are the commands, its folders what lies on the way of the data. Stage one (`extract`) and
live use (`evaluate` on images, `predict`) load timm through `pipeline.backbones.timm_models`. Stage
two (`train`, `evaluate` on a cache) never does: a device that only trains needs neither timm nor
torchvision. Nothing here prints; long functions take a `report`
callback that receives typed records.
"""

__version__ = "0.1.0"  # the only place: setup.cfg reads it, and a clone may not be installed
