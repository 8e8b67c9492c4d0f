"""An assignment as a source for otter-grader's `otter assign`, for those who use it and whose students do not cheat.

Each solution is a question with the student's stub as its prompt, and the public checks that follow it are its tests.
Hidden questions are left out: their expected values would be in the process that runs the student's code.
"""

import ast
import textwrap
from typing import TYPE_CHECKING

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell
from notebooks import keep_comments, tagged, with_cells

if TYPE_CHECKING:
    from assignments import Assignment

WARNING = {
    "en": "Warning: otter-grader runs a student's code in the same process as its tests. Five cheats got full marks "
    "with version 7.0.0: `builtins.abs` replaced; doctest patched; otter's classes patched; an object that equals "
    "everything; a detached process that writes the results over. Use it only where nobody cheats. Its tests are the "
    "public checks alone; the hidden questions are left out, and so are the answers in numbers, which a person has to "
    "grade. "
    "`make grade` and gradescope.zip ask all questions, from another process.",
    "zh": "警告：otter-grader 在同一个进程里运行学生的代码和测试。有五种作弊手法在它的 7.0.0 版拿到了满分："
    "替换 `builtins.abs`；改动 doctest；改动 otter 自己的类；返回一个与任何值都相等的对象；另起一个脱离的进程改写成绩。"
    "只在没有人作弊的场合使用。它的测试只有公开的检查，不含隐藏的题目；数值答案也不判分，需要人工批改。"
    "`make grade` 和 gradescope.zip 会问全部题目，而且是从另一个进程里问。",
}
# What students read below the title, which speaks of our grading.
NOTE = {
    "en": "*This copy is graded with otter-grader: by the checks in it, with their own small examples, and by a person "
    "who reads the answers in numbers.*",
    "zh": "*本笔记本用 otter-grader 批改：判分只看其中的检查，用的就是检查里的小例子；数值答案由人来看。*",
}
# The tests are functions, which compare more than doctests can.
CONFIG = """\
# ASSIGNMENT CONFIG
name: {name}
export_cell: false
tests:
  ok_format: false"""
SOLUTION = '''\
# BEGIN SOLUTION NO PROMPT
{solution}
# END SOLUTION
r""" # BEGIN PROMPT
{stub}
""" # END PROMPT'''
# otter gives the student's names as `env`.
TEST = """\
def test_{number}(env):
    globals().update(env)
{body}"""


class Demand(ast.NodeTransformer):
    """Turns checks, which say what is wrong, into assertions, which fail."""

    def __init__(self):
        self.found = 0

    def demanded(self, value: ast.expr) -> ast.stmt | None:
        if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "classroom.check"):
            return None
        self.found += 1
        return ast.Assert(value, None)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return self.demanded(node.value) or node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        """A second check may be asked for only where the first finds nothing wrong."""
        self.generic_visit(node)
        first = self.demanded(node.test)
        return [first, *node.body] if first else node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        """An error that the check's cell tells the student of fails the test."""
        self.generic_visit(node)
        node.body.append(ast.Raise())
        return node


def test_of(check: str, number: int) -> str | None:
    """The test that a cell with checks makes; None if it compares nothing with what is right."""
    demand = Demand()
    tree = demand.visit(ast.parse(check))
    body = textwrap.indent(ast.unparse(ast.fix_missing_locations(tree)), "    ")
    return TEST.format(number=number, body=body) if demand.found else None


def otter_source(assignment: "Assignment", language: str, setup: NotebookNode) -> NotebookNode:
    """The source notebook of one language. Raises PageError for an assignment without a check."""
    cells = [cell for cell in assignment.cells if cell.metadata.get("lang", language) == language]
    starts = [place for place, cell in enumerate(cells) if tagged(cell, "solution")]
    # A cell that begins like this is for the teacher alone: otter leaves it out.
    made = [
        new_raw_cell(CONFIG.format(name=assignment.name)),
        new_markdown_cell("## Ignore ##\n\n" + WARNING[language]),
    ]
    made += [*plain(assignment, cells[:1], language), new_markdown_cell(NOTE[language]), setup]
    made += plain(assignment, cells[1 : starts[0]], language)
    tests = 0
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(cells)], strict=True), 1):
        made.append(new_raw_cell(f"# BEGIN QUESTION\nname: q{number}"))
        made += [new_raw_cell("# BEGIN SOLUTION"), solution(assignment, cells[start], language)]
        made.append(new_raw_cell("# END SOLUTION"))
        group = cells[start + 1 : end]
        checks = [place for place, cell in enumerate(group) if tagged(cell, "public") and test_of(cell.source, 1)]
        last = checks[-1] + 1 if checks else 0
        made += plain(assignment, group[:last], language)
        if checks:
            bodies = [test_of(group[place].source, count) for count, place in enumerate(checks, 1)]
            made += [new_raw_cell("# BEGIN TESTS"), *map(new_code_cell, bodies), new_raw_cell("# END TESTS")]
        made.append(new_raw_cell("# END QUESTION"))
        made += plain(assignment, group[last:], language)
        tests += len(checks)
    if not tests:
        raise assignment.error("no public cell calls classroom.check, so otter would have no test")
    for number, cell in enumerate(made):
        cell["id"] = f"{assignment.name}-{number}"
        cell.metadata = NotebookNode()
    return with_cells(made, None)


def plain(assignment: "Assignment", cells: list[NotebookNode], language: str) -> list[NotebookNode]:
    """Cells as the student's notebook has them, those of the grader left out."""
    made = []
    for cell in cells:
        if cell.cell_type == "markdown":
            made.append(new_markdown_cell(cell.source))
        elif not tagged(cell, "hidden"):
            made.append(new_code_cell(keep_comments(cell, assignment.name, language)))
    return made


def solution(assignment: "Assignment", cell: NotebookNode, language: str) -> NotebookNode:
    stub = new_code_cell(cell.metadata["stub"].rstrip("\n"), metadata={"tags": []})
    both = [keep_comments(one, assignment.name, language) for one in (cell, stub)]
    return new_code_cell(SOLUTION.format(solution=both[0], stub=both[1]))
