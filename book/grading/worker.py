"""Runs one student's notebook in a process of its own, and answers the grader's calls with numbers.

The grader starts it as  python -I -S worker.py SETTINGS, SETTINGS being JSON: the folders to import from, and limits.
Requests come in at standard input, replies leave at standard output, each one line of JSON and then its arrays, as
.npy files one after the other: {"id": 3, "do": "call", "name": "loss", "sizes": [144, 128]}. Nothing is unpickled.

What a notebook does in here it does to itself: this process knows no expected value, and the grader believes nothing
of what comes out but that it is numbers.
"""

import ctypes
import io
import json
import os
import re
import sys
import types

MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)  # what only a notebook understands: an installation, say
LONGEST = 300  # characters of an error's message


def main() -> None:
    settings = json.loads(sys.argv[1])
    if sys.platform == "linux":  # a grader that is killed leaves no worker behind
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the notebook prints is no reply
        os.dup2(nowhere, stream)
    sys.path[:0] = settings["paths"]
    import numpy
    import torch

    import mini_impl  # noqa: F401  # here already, so that a notebook which carries the package does not unpack it

    torch.set_num_threads(1)
    limit(settings)
    notebook = Notebook(numpy, torch)
    while line := requests.readline():
        head = json.loads(line)
        arrays = [notebook.read(requests.read(size)) for size in head["sizes"]]
        for answer, results in getattr(notebook, head["do"])(head, arrays):
            blobs = [notebook.written(result) for result in results]
            answer = {"id": head["id"], "sizes": [len(blob) for blob in blobs]} | answer
            replies.write(json.dumps(answer).encode() + b"\n" + b"".join(blobs))
            replies.flush()


def limit(settings: dict) -> None:
    """Memory beyond what torch takes already, CPU seconds, the size of files, processes: hard, so they stay."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {"RLIMIT_CPU": settings["cpu"], "RLIMIT_FSIZE": 2**24, "RLIMIT_NPROC": settings["tasks"], "RLIMIT_CORE": 0}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limits["RLIMIT_AS"] = pages * os.sysconf("SC_PAGE_SIZE") + settings["memory"]
    for name, most in limits.items():
        before = resource.getrlimit(getattr(resource, name))[1]
        most = most if before == resource.RLIM_INFINITY else min(most, before)
        resource.setrlimit(getattr(resource, name), (most, most))


class Notebook:
    """The names that a notebook's cells have made, and what can be asked of them. Each method yields its replies."""

    def __init__(self, numpy, torch):
        self.numpy, self.torch = numpy, torch
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.names = vars(module)

    def hello(self, head: dict, arrays: list):
        yield {"hello": True}, []

    def cells(self, head: dict, arrays: list):
        """Run the cells: one that fails costs what needs it, and no more. It is said which one begins."""
        errors = {}
        for number, source in enumerate(head["cells"]):
            if number in head["skip"]:
                continue
            yield {"begins": number}, []
            try:
                exec(compile(MAGIC.sub(r"\1pass", source), f"cell {number + 1}", "exec"), self.names)
            except BaseException as error:
                errors[number] = described(error)
        yield {"errors": errors}, []

    def call(self, head: dict, arrays: list):
        """Call a function with tensors, and numbers where an array has no axes; head["of"]: gradients by which."""
        arguments = [array.item() if array.ndim == 0 else self.torch.from_numpy(array) for array in arrays]
        try:
            for place in head["of"]:
                arguments[place].requires_grad_()
            results = self.tensors(self.names[head["name"]](*arguments))
            if not head["of"]:
                yield {}, results
                return
            total = sum(result.sum() for result in results)
            by = [arguments[place] for place in head["of"]]
            found = self.torch.autograd.grad(total, by, allow_unused=True) if total.requires_grad else [None] * len(by)
            missing = [place for place, gradient in zip(head["of"], found, strict=True) if gradient is None]
            whole = [self.torch.zeros_like(x) if g is None else g for g, x in zip(found, by, strict=True)]
            yield {"missing": missing}, [*results, *whole]
        except BaseException as error:
            yield described(error), []

    def value(self, head: dict, arrays: list):
        """A number or an array that the notebook has computed."""
        try:
            results = self.tensors(self.names[head["name"]])
            yield {}, results
        except BaseException as error:
            yield described(error), []

    def tensors(self, result) -> list:
        """What was returned, one tensor or several, as a list of tensors."""
        if result is None:
            raise NotImplementedError("None")
        parts = list(result) if isinstance(result, (tuple, list)) else [result]
        return [part if isinstance(part, self.torch.Tensor) else self.torch.as_tensor(part) for part in parts]

    def read(self, blob: bytes):
        return self.numpy.load(io.BytesIO(blob), allow_pickle=False)

    def written(self, tensor) -> bytes:
        file = io.BytesIO()
        self.numpy.save(file, tensor.detach().cpu().numpy(), allow_pickle=False)
        return file.getvalue()


def described(error: BaseException) -> dict:
    try:
        return {"error": type(error).__name__[:LONGEST], "message": str(error)[:LONGEST]}
    except BaseException:  # the student's class may fail to say what it is
        return {"error": "Exception", "message": ""}


if __name__ == "__main__":
    main()
