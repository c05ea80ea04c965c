"""Words for RULER's tasks: those of the package `wonderwords` where it is there, else these."""

from __future__ import annotations

import functools

ADJECTIVES = (
    "able amber ancient ample arctic autumn awake basic better bitter blank blunt bold brave brief "
    "bright brisk broad calm candid careful cheap chilly civil clean clear clever close cold "
    "common cool crisp curly daily dark deep dense distant double dry dull eager early easy empty "
    "equal even exact fair faint famous fancy fast fierce final fine firm flat fluffy formal frank "
    "free fresh full gentle giant glad global golden good grand great green hard heavy hidden "
    "hollow honest huge humble icy idle inner keen kind large late lazy level light little local "
    "lonely long loud lucky magic major mellow mild minor modern moist narrow neat new noble noisy "
    "normal odd old open orange outer pale patient plain polite private proud public pure quick "
    "quiet rapid rare ready real rich rigid ripe rough round royal rusty salty sharp shiny short "
    "shy silent silver simple single sleepy slim slow small smart smooth soft solid sour spare "
    "steady steep stiff still strict strong sudden sunny sweet swift tall tame tender thick thin "
    "tidy tiny tired total tough true urban vague vast vivid warm weak wet whole wide wild wise "
    "witty wooden young"
)
NOUNS = (
    "acorn anchor apple apron arrow atlas badge bakery ball banjo barrel basket beach bell bench "
    "berry bike bird blanket boat book bottle bowl branch bread brick bridge broom brush bucket "
    "bus butter button cabin cable cake camera canal candle canoe canvas carpet castle cellar "
    "chair chalk cherry chest circle city clock cloud coast coat coffee coin comet cookie corner "
    "cotton cousin cradle crayon creek crown cup curtain daisy desk diary dish doctor dolphin door "
    "dragon dream drum eagle earth elbow engine envelope falcon family farm feather fence ferry "
    "field finger fire flag flame flower flute forest fork fountain fox friend frog garden gate "
    "ghost glass glove goat grape guitar hammer harbor hat hawk helmet hill honey horn horse hotel "
    "house island jacket jar jewel jungle kettle key kitchen kite knee ladder lake lamp lantern "
    "leaf lemon letter library lion lizard lock magnet map maple market meadow melon mirror monkey "
    "moon motor mountain museum needle nest notebook oak ocean office onion orchard otter oven owl "
    "paint palace panda paper parrot path pearl pencil pepper piano picture pillow pilot planet "
    "plate pocket poem pond potato prince puzzle queen quilt rabbit radio railway rain ribbon ring "
    "river road robin rocket roof rope rose sailor salad salmon sand saddle school scissors sea "
    "shadow shell shirt shoe shovel singer sister sky snow soap sofa soup spider spoon stamp star "
    "station stone story street sugar summer sun table tailor teacher temple tent thunder tiger "
    "tower toy train tree tunnel turtle umbrella uncle valley vase village violin wagon wall "
    "walnut water wave whale wheel willow window winter wizard wolf wool yard zebra"
)
VERBS = (
    "add admit agree aim allow answer arrive ask bake begin bend blink boil borrow bounce bring "
    "build buy call carry catch change chase check choose climb collect compare cook copy count "
    "cover crawl create cross cry cut dance decide deliver dig dive draw drift drink drive drop "
    "earn eat enjoy enter expect explain fall feed feel fetch fill find fish fix float fly fold "
    "follow forget gather give glow grab grow guess hang happen hear help hide hold hope hunt "
    "hurry invent invite join juggle jump keep kick kneel knit knock know laugh lead lean learn "
    "leave lend lift listen live look lose mend mix move need nod notice obey offer order own pack "
    "park paste pause pay peel pick plan plant play point pour pray print promise pull push put "
    "race read reach remember repair reply rest return ride rise roll row run sail save say search "
    "sell send serve settle sew shake share shine shout show shut sing sit skate skip sleep slide "
    "smell smile sneeze solve sort speak spell spend spin stand start stay stir stop stretch study "
    "swim swing take talk taste teach tell thank think throw tie touch trade travel trust try turn "
    "type use visit wait wake walk want wash watch wave wear weigh whisper win wish wonder work "
    "wrap write yawn"
)


@functools.cache
def words() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return adjectives, nouns and verbs, each sorted and once."""
    kinds = [text.split() for text in (ADJECTIVES, NOUNS, VERBS)]
    try:
        from wonderwords import RandomWord
    except ImportError:
        pass
    else:
        known = RandomWord()._categories  # the package has no public way to all of them
        kinds = [known["adjectives"], known["nouns"], known["verbs"]]
    return tuple(tuple(sorted(set(kind))) for kind in kinds)


@functools.cache
def single_words() -> tuple[str, ...]:
    """Return all of the words, sorted and each once."""
    return tuple(sorted({word for kind in words() for word in kind}))
