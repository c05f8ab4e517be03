from qlora_jax.runtime.liveness import ENDED, GRACE_S, SILENT_S, Signs


def test_a_process_that_beats_is_alive() -> None:
    signs = Signs(index=0, count=3, now=0)
    for now in range(100):
        signs.update({0: "0", 1: str(now), 2: str(now // 3)}, now)
        assert signs.fault(now) is None


def test_a_silent_process_is_found() -> None:
    signs = Signs(index=0, count=2, now=0)
    signs.update({1: "7"}, 5)
    signs.update({1: "7"}, 5 + SILENT_S)
    assert signs.fault(5 + SILENT_S) is None
    signs.update({1: "7"}, 6 + SILENT_S)
    assert "process 1 has given no sign of life" in str(signs.fault(6 + SILENT_S))


def test_the_others_have_time_to_end_by_themselves() -> None:
    signs = Signs(index=1, count=2, now=0)
    signs.update({0: "3"}, 1)
    signs.update({0: f"{ENDED}the disk is full"}, 2)
    assert signs.fault(2 + GRACE_S) is None
    assert signs.fault(2.5 + GRACE_S) == "process 0 ended: the disk is full"


def test_a_service_that_does_not_answer_is_found() -> None:
    signs = Signs(index=1, count=2, now=0)
    signs.update({0: "1"}, 3)
    assert signs.fault(3 + SILENT_S) is None
    assert "process 0 has not answered" in str(signs.fault(4 + SILENT_S))
