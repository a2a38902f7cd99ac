from tasks.dialogue.preference import Group, preference_groups


def test_a_group_holds_the_ranked_replies_best_first() -> None:
    #          0 <- 1, 2, 3, 4;  3 <- 5;  6 <- 7, 8
    children = [[1, 2, 3, 4], [], [], [5], [], [], [7, 8], [], []]
    replies = [False, True, True, True, True, False, False, True, True]
    ranks = [None, 2, 0, None, 1, None, None, 0, 0]
    assert list(preference_groups(children, replies, ranks)) == [Group(0, (2, 4, 1), (0, 1, 2))]


def test_equal_ranks_are_no_preference() -> None:
    assert Group(0, (1, 2, 3), (0, 0, 1)).pairs == 2
    assert Group(0, (1, 2), (0, 0)).pairs == 0
    assert Group(0, (1, 2, 3), (0, 1, 2)).without(2) == Group(0, (1, 3), (0, 2))
