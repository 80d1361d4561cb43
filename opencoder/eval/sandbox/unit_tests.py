"""Runs inside the sandbox: loads a program with its unittest cases, runs them, reports by name. Not imported by anything.

It keeps its own copies of what it needs before the program is loaded, and writes to a descriptor that was duplicated before. A
program made to forge this very file still can: it is the same process."""

import io
import json
import os
import sys
import unittest


def main() -> None:
    with open("job.json") as file:
        job = json.load(file)
    os.unlink("job.json")
    sys.path.extend(job["path"])
    out = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    write, leave, dumps = os.write, os._exit, json.dumps
    results: dict[str, str] = {}

    class Result(unittest.TestResult):
        def addSuccess(self, test: unittest.TestCase) -> None:
            results[test._testMethodName] = "passed"

        def addFailure(self, test: unittest.TestCase, err: object) -> None:
            results[test._testMethodName] = "failed"

        def addError(self, test: unittest.TestCase, err: tuple) -> None:
            name = getattr(test, "_testMethodName", "setUpClass")
            results[name] = f"error: {err[0].__name__}: {err[1]}"[:500]

        def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: object) -> None:
            if err is not None:
                results[test._testMethodName + " (subtest)"] = "failed"

    def spoil(how: str) -> object:
        def test(self: unittest.TestCase) -> None:
            if how == "equal":
                self.assertEqual(1, 2)  # noqa: PT009
            elif how == "true":
                self.assertTrue(0)  # noqa: PT009
            else:
                raise AssertionError("must fail")

        return test

    module = type(sys)("__test__")
    sys.modules["__test__"] = module
    exec(compile(job["source"] + "\n" + job["test"], "__test__.py", "exec"), module.__dict__)
    cases = module.TestCases
    canaries = type("Canaries", (cases,), {name: spoil(how) for name, how in job["canaries"].items()})
    own = [name for name in dir(canaries) if name.startswith("test")]
    sys.stdout = io.StringIO()
    unittest.TestSuite(map(canaries, own)).run(Result())
    write(out, (job["nonce"] + dumps(results) + "\n").encode())
    leave(0)


if __name__ == "__main__":
    main()
