from tasks.dialogue.verdicts import named_in, near_evidence


def test_a_verdict_names_the_message_that_it_is_about() -> None:
    assert near_evidence("tree 1", 10 / 11) == "tree 1 0.909"
    assert named_in("near_duplicate", near_evidence("tree 1", 0.8)) == "tree 1"
    assert named_in("leak", near_evidence("a", 1.0)) == "a"
    assert named_in("duplicate", "tree 1") == named_in("parent", "tree 1") == "tree 1"
    assert named_in("spam", "label_spam 0.8 > 0.5") is None
