"""Nonsense lyrics: random phrases of common words, sung by the voice bank (POP909 has no lyrics)."""

import numpy as np

WORDS = {
    "en-us": (
        "love you me baby tonight forever never dream dreaming night light shine star stars sky fly away "
        "stay  with without your heart soul fire water rain sun moon summer winter river ocean road home "
        "alone  together always remember feel feeling falling down up high low slow dance dancing music "
        "song singing  voice hear here there where when why again begin end world time day morning "
        "evening tomorrow yesterday  hold hand hands eyes smile tears crying lonely only holy open broken "
        "golden silver blue red color  shadow window door floor wall city street runaway highway train "
        "plane letter better ever over under  believe leave lie true truth youth beautiful wonderful "
        "little bitter sweet memory melody harmony  breathe breathing touch closer further thunder "
        "lightning burning turning learning waiting hoping  maybe somebody nobody everybody everything "
        "anything something nothing just the a and in on of to"
    ).split(),
    "es": (
        "amor mi vida corazón noche luna sol cielo mar estrella sueño siempre nunca contigo sin ti quiero "
        "bailar cantar llorar besos manos ojos alma fuego lluvia camino tiempo mañana ayer hoy dime dónde "
        "vuelve conmigo solo sola libre volar recuerdo olvidar esperar sentir vivir morir canción dulce"
    ).split(),
    "it": (
        "amore mio vita cuore notte luna sole cielo mare stella sogno sempre mai con te senza voglio "
        "ballare  cantare piangere baci mani occhi anima fuoco pioggia strada tempo domani ieri oggi "
        "dimmi dove torna  volare ricordo aspettare sentire vivere canzone dolce bella primavera estate "
        "bambina lontano"
    ).split(),
    "de": (
        "liebe mein leben herz nacht mond sonne himmel meer stern traum immer nie mit dir ohne tanzen "
        "singen  weinen hände augen seele feuer regen weg zeit morgen gestern heute sag mir wo komm "
        "zurück allein  frei fliegen erinnern warten fühlen lied süß schön sommer winter wieder bleib bei "
        "uns"
    ).split(),
    "fr-fr": (
        "amour ma vie coeur nuit lune soleil ciel mer étoile rêve toujours jamais avec toi sans danser "
        "chanter  pleurer mains yeux âme feu pluie chemin temps demain hier dis moi reviens seul libre "
        "voler souvenir  oublier attendre sentir chanson douce belle été hiver encore loin"
    ).split(),
    "ja": (
        "koi no yume hana sora umi kaze ame yuki natsu fuyu haru aki kimi boku anata watashi kokoro "
        "namida  egao hikari yoru asa machi michi tabi uta koe te hitomi omoide itsuka itsumo zutto motto "
        "aitai  sayonara arigatou daisuki hoshi tsuki sakura mirai kanata tooku chikaku sekai futari "
        "hitori"
    ).split(),
}


def write_phrases(language: str, count: int, rng: np.random.Generator) -> list[list[str]]:
    """`count` phrases of five to eight words each."""
    words = WORDS[language]
    return [list(rng.choice(words, size=int(rng.integers(5, 9)))) for _ in range(count)]
