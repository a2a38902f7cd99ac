"""Laws of explaining: the nearest recipe is compared, old value first."""

from typing import Any

from tasks.store.explain import NEW, differences, why_missing
from tasks.store.manifest import Manifest


def made(**recipe: Any) -> Manifest:
    return Manifest("", "tokens", {"step": "encode", **recipe}, {}, "")


def test_a_changed_setting_is_named_with_old_and_new() -> None:
    new = {"step": "encode", "params": {"block": 1024, "layout": "paths"}}
    far = made(params={"block": 256, "layout": "top1"})
    near = made(params={"block": 512, "layout": "paths"})
    assert why_missing(new, [near, far]) == "params.block: 512 -> 1024"


def test_digests_are_shortened_and_absent_settings_shown() -> None:
    assert differences({"a": "0" * 64}, {"a": "f" * 64}) == [f"a: {'0' * 12}… -> {'f' * 12}…"]
    assert differences({"old": 1}, {"new": None}) == ["new: (absent) -> None", "old: 1 -> (absent)"]


def test_nothing_to_compare_with_is_said() -> None:
    assert why_missing({"step": "encode"}, []) == NEW
    assert why_missing({"step": "encode"}, [made()]) == "its files are gone"


def test_an_input_is_named_by_the_artifact_that_holds_it() -> None:
    old, new = made(inputs={"messages": "0" * 64}), {"step": "encode", "inputs": {"messages": "f" * 64}}
    names = {"0" * 64: "messages/0123456789ab", "f" * 64: "messages/ba9876543210"}
    assert why_missing(new, [old], names) == "inputs.messages: messages/0123456789ab -> messages/ba9876543210"
