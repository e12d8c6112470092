"""Words that generated texts are made of: our own lists, so that nothing is downloaded.

RULER takes its words from the package wonderwords (some 7,000).  Here longer lists are compounds of
these words, which never run out before a text does.
"""

from __future__ import annotations

import random
import uuid

from saccade.core import BadInput

ADJECTIVES = tuple(
    """able amber ancient autumn azure bitter blank bold brave brief bright brisk broad bronze calm
    candid careful cheerful chilly civil clever cloudy coarse cold cool copper coral cosmic crisp
    crooked curious daily damp daring dark deep dense distant dusty eager early earnest elder empty
    even faint famous fancy fearless fertile fierce final flat fluent formal fragile fresh frosty
    gentle giant glad golden graceful grand green hardy hasty hidden hollow honest humble icy idle
    jolly keen kind large late lazy light lively local lonely loud loyal lucky lunar mellow merry
    mild misty modern narrow neat noble noisy novel odd open orange pale patient plain polite proud
    purple quick quiet rapid rare ready regal rigid rough round royal rustic sacred salty scarlet
    secret serene shallow sharp shiny silent silver simple slender slow smooth snowy solid spare
    stable steep still stormy sturdy subtle sunny swift tall tame tender thick tidy tiny tough
    upper urban useful vague vast velvet violet warm wary wild windy wise witty wooden young
    zealous""".split()
)
NOUNS = tuple(
    """acorn actor album alley anchor antler apple apron arrow atlas badge baker balcony bamboo
    banner barrel basin basket beacon beaver bench berry bishop blanket bottle boulder branch brick
    bridge bucket butter button cabin cactus camel candle canyon carpet castle cedar cellar chapel
    cherry chimney circus cliff clock cobra comet compass cottage cradle crater cricket crown
    curtain cushion dagger daisy desert diamond dolphin donkey dragon drum eagle easel engine
    falcon farmer feather fender fiddle flute forest fossil fountain fox garden garlic gate ginger
    glacier goblet grape guitar hammer harbor hazel helmet heron hill honey hornet horse island
    ivory jacket jaguar jungle kettle kitten ladder lagoon lantern lemon leopard library lizard
    locket lotus magnet mango maple marble market meadow melon mirror monkey mountain museum
    mustard napkin needle nickel oasis ocean olive onion orchard otter oyster paddle palace panda
    parrot pebble pencil pepper piano pigeon pillow pirate planet plum pocket pony poppy potato
    prairie puzzle quarry quilt rabbit raven ribbon river robin rocket saddle salmon sandal scarf
    school shadow shovel signal spider spoon squirrel stable statue summit sunset table teapot
    temple thimble thunder ticket tiger timber tower trumpet tulip tunnel turtle umbrella valley
    vessel violin volcano wagon walnut walrus whistle willow window winter wizard zebra""".split()
)
VERBS = tuple(
    """accept adjust admire advise amuse answer argue arrange arrive assist attach avoid bake
    balance bathe borrow bounce bow breathe build carve chase cheer choose climb collect combine
    compare complain connect copy count crawl cure dance decide deliver describe divide draw dream
    dress drift earn employ enjoy escape examine explain explore fetch fold follow forgive gather
    greet grow guess guide harvest hurry imagine improve inform invent invite jog juggle kneel
    knit laugh launch learn lend listen measure mend mingle notice obey observe offer organize
    paint pause perform polish praise prepare print promise publish pull push reach refuse remember
    remind rent repair repeat reply rescue retire reward sail scatter search share sketch smile
    sneeze solve sort spill squeeze stretch suggest supply surround swim teach thank trace travel
    tremble trust twist unlock vanish visit wander weave wonder wrap yawn""".split()
)
PLAIN = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))
"""Single words, each once."""
_PAIRS = len(ADJECTIVES) * len(NOUNS)


def word_keys(count: int, rng: random.Random) -> list[str]:
    """`count` different names such as `quiet-harbor`.

    Raises:
        BadInput: more than there are.
    """
    if count > _PAIRS:
        raise BadInput(
            f"a text with {count:,} keys needs more names than the {_PAIRS:,} that there are: "
            "ask for a shorter context."
        )
    chosen = rng.sample(range(_PAIRS), count)
    return [f"{ADJECTIVES[at // len(NOUNS)]}-{NOUNS[at % len(NOUNS)]}" for at in chosen]


def numbers(count: int, rng: random.Random) -> list[str]:
    """`count` different numbers of seven digits."""
    return [str(number) for number in rng.sample(range(10**6, 10**7), count)]


def uuids(count: int, rng: random.Random) -> list[str]:
    """`count` random UUIDs of version 4."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def listed_words(count: int, common: int, rng: random.Random) -> list[str]:
    """`count` different words, of which the first `common` are no part of any other.

    So an answer that contains another word is never read as one of the common ones.

    Raises:
        BadInput: more words than there are.
    """
    if count <= len(PLAIN):
        pool = list(PLAIN)
    elif count <= len(PLAIN) + _PAIRS:
        pool = [*PLAIN, *(a + n for a in ADJECTIVES for n in NOUNS)]
    else:
        raise BadInput(
            f"a list of {count:,} different words needs more than the {len(PLAIN) + _PAIRS:,} "
            "that there are: ask for a shorter context."
        )
    chosen = rng.sample(pool, count)
    return _clear_first(chosen, common)


def _clear_first(words: list[str], common: int) -> list[str]:
    """The words in another order: in front `common` that are contained in no other word."""
    whole = "\n".join(words)
    clear: list[str] = []
    for word in words:
        if len(clear) < common and whole.count(word) == 1:
            clear.append(word)
    assert len(clear) == common, "most words are part of no other"
    rest = set(clear)
    return [*clear, *(word for word in words if word not in rest)]
