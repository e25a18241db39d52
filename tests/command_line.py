"""What tests of the command line share: the form of a mistake's message."""


def assert_one_line_error(outcome, *parts):
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("viditq: ")
    for part in parts:
        assert part in err
