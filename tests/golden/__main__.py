"""Write the golden files of new cases; leave all others as they are."""

from tests.golden import GOLDEN, golden_cases, written

for kind in ("codec", "keys", "frames", "sealed"):
    (GOLDEN / kind).mkdir(exist_ok=True)
    for name, case in golden_cases(kind).items():
        path = GOLDEN / kind / name
        if not path.exists():
            path.write_bytes(written(kind, case))
            print("wrote", path.relative_to(GOLDEN))
