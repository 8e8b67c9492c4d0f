"""Make tests/golden/dapo.json: TRL's soft overlong punishment of answers of all lengths (make golden).

DAPO's loss is in policy.json, which make_policy.py writes.
"""

import json
from pathlib import Path

import trl
from trl.rewards import get_soft_overlong_punishment

if __name__ == "__main__":
    cases = []
    for max_length, buffer in [(10, 4), (10, 10), (7, 1), (50, 20)]:
        lengths = list(range(max_length + 4))
        punishment = get_soft_overlong_punishment(max_completion_len=max_length, soft_punish_cache=buffer)
        penalties = punishment(completion_ids=[[1] * length for length in lengths])
        cases.append({"max_length": max_length, "buffer": buffer, "lengths": lengths, "penalties": penalties})
    golden = {"made by": "tests/golden/make_dapo.py", "versions": {"trl": trl.__version__}, "cases": cases}
    Path(__file__).with_name("dapo.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
