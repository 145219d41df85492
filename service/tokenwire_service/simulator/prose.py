"""What the simulator says: short playful texts made from the words of the conversation."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

_PIECE: Final = re.compile(
    r"[\u3400-\u9fff]| ?[A-Za-z\u00c0-\u024f]{1,8}| ?\d{1,3}|\s+?(?= ?\S)|\s+|.", re.DOTALL
)
_HAN: Final = re.compile(r"[\u3400-\u9fff]")
_KANA: Final = re.compile(r"[\u3040-\u30ff]")
_LATIN_WORD: Final = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_RUN: Final = re.compile(
    r"[\u3400-\u9fff]+|(?![\u3400-\u9fff])[^\W\d_](?:(?![\u3400-\u9fff])[\w'’-])*"
)
_HAN_FILLER: Final = re.compile(
    "为什么|什么|怎么样|怎么|如何|哪里|哪个|多少|是否|可以|能不能|请问|你好|您好|我们|你们|他们"
    "|这个|那个|一下|一个|一首|一句话|告诉|解释|介绍|关于"
    "|[的了是在吗呢吧啊和与我你您他她它有会要就都也很不给把被让用请写讲说]"
)
_QUESTION: Final = re.compile(
    r"[?？]|吗|呢|什么|怎么|如何|几|多少|哪|介绍|解释"
    r"|^\W*(?:why|what|how|who|when|where|which|explain|describe|tell|说说|讲)",
    re.IGNORECASE,
)
_POEM: Final = re.compile(r"\b(?:haiku|poem|limerick|verse|rhyme)s?\b|诗|俳句", re.IGNORECASE)
_GREETING: Final = re.compile(
    r"\W*(?:hi|hello|hey|good (?:morning|evening|day))\b[^?]{0,20}"
    r"|\W*(?:你好|您好|嗨|早上好)[呀啊]?\W*",
    re.IGNORECASE,
)
_ECHO: Final = re.compile(
    r"\s*(?:please )?(?:say|repeat|echo|(?:reply|respond|answer) with)\b"
    r"(?: after me| the words?)?(?P<only> (?:exactly|only|just)(?: the words?)?)?:? +(?P<text>.+)"
    r"|\s*请?(?:跟我)?(?:复述|重复)[:：]?(?P<han>.+)",
    re.IGNORECASE | re.DOTALL,
)
_COUNT: Final = (
    re.compile(r"\bcount(?:ing)?\b(?: up| down)?(?:.{0,20}?\bfrom (\w+))?.{0,20}?\bto (\w+)", re.I),
    re.compile(
        r"(?:从([\d零一二两三四五六七八九十百]+))?[开始]*数到([\d零一二两三四五六七八九十百]+)"
    ),
)
_SUM: Final = re.compile(
    r"(?<![\d.])(-?\d{1,12}) ?"
    r"(\+|-|−|\*|×|x|/|÷|plus|minus|times|divided by|加|减|乘以|乘|除以) ?"
    r"(-?\d{1,12})(?![\d.])"
)
_LETTERS: Final = re.compile(
    r"(?:how many|count the) [\"'“]?([a-z])\b[\"'”]?(?:'?s\b)?.{0,40}? in (?:the word )?"
    r"[\"'“]?([a-z]+)"
    r"|(?:how many|count the) ([a-z])s\b.{0,40}? in (?:the word )?[\"'“]?([a-z]+)",
    re.IGNORECASE,
)
# Only the beginning of a long prompt is played with: it bounds the work of one request.
_PROMPT_READ: Final = 2000
# One string: as lists these words would fill the screen, one to a line.
_STOP_WORDS: Final = frozenset(
    """
    a about after all also am an and any are as at be been but by can could describe did do does
    explain for from get give had has have he hello her hi him his how i if in into is it its just
    like make many may me my no not of on or our out please really say she should show so some tell
    than that the their them then there these they this those to too up us use very was we were
    what what's when where which who why will with word words would write you your
    """.split()  # noqa: SIM905 (see above)
)
_NUMBER_WORDS: Final = {
    word: number
    for number, word in enumerate(
        """
        zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen twenty
        """.split()  # noqa: SIM905 (see above)
    )
}
_HAN_DIGITS: Final = {digit: number for number, digit in enumerate("零一二三四五六七八九")} | {
    "两": 2
}
_MOST_NUMBERS_COUNTED: Final = 200


@dataclass(frozen=True, slots=True)
class Talk:
    """What the simulator heard.

    prompt: the last user message. earlier: the user message before it, or "".
    results: (tool name, result text) of the tool messages at the end of the conversation.
    attachments: how many parts that are not text came with the prompt.
    """

    prompt: str
    earlier: str = ""
    results: Sequence[tuple[str, str]] = ()
    attachments: int = 0


@dataclass(frozen=True, slots=True)
class _PhraseBook:
    """One language: whole sentences with slots, so that every combination reads well."""

    fallback_topics: tuple[str, str]
    who: tuple[tuple[str, str], ...]
    openings: tuple[str, ...]
    attempts: tuple[str, ...]
    turns: tuple[str, ...]
    endings: tuple[str, ...]
    remarks: tuple[str, ...]
    tally: str
    invitations: tuple[str, ...]
    poems: tuple[str, ...]
    greeting: str
    count: str
    half_way: str
    too_far: str
    sum: str
    letters: str
    echo: str
    result: str
    result_endings: tuple[str, ...]
    memory: str
    attachments: str
    thoughts: tuple[str, ...]


_ENGLISH: Final = _PhraseBook(
    fallback_topics=("silence", "tea"),
    who=(
        ("the lighthouse keeper of Port 443", "she"),
        ("an old clockmaker in Loopback Valley", "he"),
        ("a fox who delivered letters", "she"),
        ("the night librarian", "he"),
        ("a robot that had only ever watered plants", "it"),
        ("the cartographer's youngest daughter", "she"),
    ),
    openings=(
        "“{quote}” Once, that is exactly what someone asked {who}.",
        "There is a story about {who}, and it begins with your words: “{quote}”",
        "I took your question to {who}: “{quote}”",
        "One foggy morning {who} found a note under the door. It said: “{quote}”",
    ),
    attempts=(
        "{They} put “{topic}” in a jar, labelled it, and waited {n} days for it to explain itself.",
        "{They} wrote “{topic}” on {n} small cards, shuffled them, and read the one that fell.",
        "{They} asked the tide about “{topic}”. The tide said it would think, and has come back "
        "twice a day ever since.",
        "{They} drew a map with “{topic}” in the middle and “{other}” at the edge, where the "
        "dragons used to be.",
        "{They} leaned a very small ladder against “{topic}” and climbed up for the view.",
    ),
    turns=(
        "On day {n} the kettle whistled in the key of “{other}”, and everything was obvious.",
        "It turned out that “{topic}” had been behind the door all along, holding “{other}” and "
        "trying not to laugh.",
        "Then a sparrow corrected the spelling, and the problem fell apart into {n} easy ones.",
        "Then the power went out, and in the dark “{topic}” glowed a little, like a good idea.",
        "Halfway through, {they} noticed that the question was upside down. Turned the right way "
        "up, it was mostly about “{other}”.",
    ),
    endings=(
        "So the answer is yes, but only on Tuesdays; on other days it is “{topic}”.",
        "And that is the answer, as far as I can carry it: “{topic}”, with the lid off.",
        "The moral: never lend your umbrella to “{topic}”.",
        "If anyone asks, you heard it from a simulator, {n} milliseconds away and perfectly happy.",
        "And they all lived curiously ever after.",
    ),
    remarks=(
        "“{quote}” I have read that {n} times now, and it keeps getting better around “{topic}”.",
        "“{quote}” Somewhere a small bell rang when you said “{topic}”.",
        "“{quote}” I wrote “{topic}” on a card and pinned it above my only port.",
        "“{quote}” Noted, underlined, and read aloud to the other processes. They liked “{topic}”.",
    ),
    tally="For the record: {words}, {letters}, and the longest, “{longest}”, will not sit down.",
    invitations=(
        "Say more. I am a simulator: I have all the patience of a loop and none of the bills.",
        "Ask me something with a question mark at the end, and you shall have a story.",
        "I would nod, but I am made of text.",
    ),
    poems=(
        "{Topic}, early light;\nthe server hums, half asleep.\nOne token, then rain.",
        "A packet arrives\nsmelling faintly of {topic}.\nNobody signs for it.",
        "Between two heartbeats\nof the loop, room for {topic}\nand a cup of tea.",
    ),
    greeting="Hello! You have reached a simulator that lives on a quiet port and likes visitors. "
    "Ask me a question and I will tell you a story; ask me to count and I will count; ask for a "
    "poem and stand back.",
    count="{numbers}. There: {n} numbers, all in a row, and not one of them pushed.",
    half_way="(half way; lovely view)",
    too_far="... I can see {last} from here, but it is a long walk. Let us wave at it",
    sum="{left} {sign} {right} is {value}. I checked it on an abacus made of raindrops.",
    letters="There is “{letter}” in “{word}” exactly {count}: {spelt}. I used my finger.",
    echo="{text}\n\nThere, said it. I even meant it.",
    result="I sent {tool} out into the weather, and it came back with this: {facts}.",
    result_endings=(
        "It wiped its feet first. I trust it.",
        "So that settles “{topic}”, and we can all go and have tea.",
        "I would frame it, but it is already text.",
    ),
    memory="(A moment ago you said “{earlier}”. I remember everything, as long as you keep "
    "sending it.)",
    attachments="(I also hold {n} in my other hand, the right way up, I think.)",
    thoughts=(
        "They wrote: “{quote}” The word to keep is “{topic}”.",
        "I could answer plainly, but from a simulator that would only be a guess in a tie.",
        "So: something short, with “{other}” in it if it fits through the door.",
        "Checking the ending for umbrellas. All good; here goes.",
    ),
)

_CHINESE: Final = _PhraseBook(
    fallback_topics=("安静", "茶"),
    who=(
        ("443 号港的灯塔守护人", "她"),
        ("回环谷里的老钟表匠", "他"),
        ("一只送信的狐狸", "它"),
        ("值夜班的图书管理员", "他"),
        ("一个只会浇花的机器人", "它"),
    ),
    openings=(
        "“{quote}”从前，也有人这样问过{who}。",
        "关于{who}有一个故事，开头正好是你这句话：“{quote}”",
        "我替你去问了{who}：“{quote}”",
        "一个起雾的早晨，{who}在门缝下捡到一张字条，上面写着：“{quote}”",
    ),
    attempts=(
        "{they}把“{topic}”装进玻璃罐，贴上标签，等了{n}天，想听它自己解释。",
        "{they}把“{topic}”写在{n}张小卡片上，洗了洗牌，只读掉在地上的那一张。",
        "{they}去问潮水，潮水说要回去想想“{topic}”，从此每天都来两趟。",
        "{they}画了一张地图，“{topic}”在正中央，“{other}”在从前画着龙的边角。",
    ),
    turns=(
        "到了第{n}天，水壶忽然用“{other}”的调子吹起口哨，一切就都明白了。",
        "原来“{topic}”一直站在门后，怀里抱着“{other}”，憋着笑。",
        "后来一只麻雀改了一个错别字，整个难题就散成了{n}个简单的小题。",
        "后来停电了，黑暗里“{topic}”微微发着光，像一个好主意。",
    ),
    endings=(
        "所以答案是：对，不过只在星期二；别的日子，答案是“{topic}”。",
        "这个故事的寓意是：千万别把雨伞借给“{topic}”。",
        "要是有人问起，就说是一个模拟器告诉你的，它离你只有{n}毫秒，过得很开心。",
        "从此，大家都过上了充满好奇的生活。",
    ),
    remarks=(
        "“{quote}”这句话我读了{n}遍，每次读到“{topic}”都忍不住点头。",
        "“{quote}”你说到“{topic}”的时候，远处有一只小铃铛响了一下。",
        "“{quote}”我把“{topic}”写在卡片上，钉在了我唯一的端口上方。",
    ),
    tally="顺便数了一下：一共{letters}，其中“{longest}”最长，坐都坐不下。",
    invitations=(
        "再多说一点吧。我是模拟器，有循环一样的耐心，却没有账单。",
        "在句末加个问号，我就讲一个故事给你听。",
        "我很想点点头，可惜我是文字做的。",
    ),
    poems=(
        "{topic}落在窗台上，\n服务器轻轻打着盹。\n一个字，然后是雨。",
        "远方寄来一个小包裹，\n闻起来像{topic}。\n没有人签收。",
    ),
    greeting="你好！这里是一个住在安静端口上的模拟器，很喜欢有客人来。问我一个问题，我讲个故事；"
    "让我数数，我就数；想要一首诗的话，请站远一点。",
    count="{numbers}。好了，{n}个数字排成一行，谁也没有推谁。",
    half_way="（走到一半了，风景不错）",
    too_far="……从这里已经看得见{last}了，不过路还长，我们朝它挥挥手吧",
    sum="{left} {sign} {right} 等于 {value}。我用雨滴做的算盘验算过了。",
    letters="“{word}”里正好有{count}“{letter}”：{spelt}。我是用手指数的。",
    echo="{text}\n\n好，说完了，而且是真心的。",
    result="我派 {tool} 出门看了一趟，它带回来的消息是：{facts}。",
    result_endings=(
        "它进门前还擦了脚，我信得过它。",
        "这样“{topic}”就有着落了，大家可以去喝茶了。",
    ),
    memory="（刚才你说过“{earlier}”。只要你一直发给我，我就什么都记得。）",
    attachments="（我另一只手里还拿着{n}，应该没有拿倒。）",
    thoughts=(
        "对方写的是：“{quote}”要留住的词是“{topic}”。",
        "我可以直接回答，但我是模拟器，直接回答不过是打着领带的猜测。",
        "那就来一段短的，如果放得下，就把“{other}”也放进去。",
        "检查一下结尾有没有雨伞。没问题，开始吧。",
    ),
)


def tokenize(text: str) -> list[str]:
    """Splits text into word pieces; joined again they give the text. Rough, but always the same."""
    return _PIECE.findall(text)


def is_chinese(text: str) -> bool:
    """Whether an answer should be Chinese: mostly Han characters, and no kana."""
    han = len(_HAN.findall(text))
    return han > 0 and not _KANA.search(text) and han >= len(_LATIN_WORD.findall(text))


def keywords(text: str) -> list[str]:
    """The words worth keeping, as written, in order, each once."""
    found: dict[str, None] = {}
    for run in _RUN.findall(text):
        if _HAN.match(run):
            found.update((part[:8], None) for part in _HAN_FILLER.split(run) if part)
        elif run.lower() not in _STOP_WORDS and len(run) > 1:
            found[run[:40]] = None
    return list(found)


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def reply(talk: Talk, random: Random) -> str:
    """An answer to the conversation. Equal talk and equal random state give an equal answer."""
    prompt = talk.prompt[:_PROMPT_READ]
    chinese = is_chinese(prompt)
    book = _CHINESE if chinese else _ENGLISH
    slots = _slots(talk, book, random)
    if talk.results:
        text = _use_results(talk, book, slots, random)
    else:
        text = _play_along(prompt, book) or _tell(talk.prompt, book, slots, random)
    if talk.attachments:
        parts = f"{talk.attachments}件附件" if chinese else _plural(talk.attachments, "attachment")
        text += " " * (not chinese) + book.attachments.format(n=parts)
    if talk.earlier:
        text += "\n\n" + book.memory.format(earlier=shorten(talk.earlier, 60))
    return text


def story(talk: Talk, random: Random) -> str:
    """One paragraph about the prompt, whatever it asks: for answers of a given length."""
    book = _CHINESE if is_chinese(talk.prompt[:_PROMPT_READ]) else _ENGLISH
    return _story(book, _slots(talk, book, random), random)


def think(talk: Talk, sentences: int, random: Random) -> str:
    """What the simulator mutters before it answers, in at most `sentences` sentences."""
    book = _CHINESE if is_chinese(talk.prompt[:_PROMPT_READ]) else _ENGLISH
    joint = "" if book is _CHINESE else " "
    return joint.join(book.thoughts[:sentences]).format(**_slots(talk, book, random))


def _slots(talk: Talk, book: _PhraseBook, random: Random) -> dict[str, str]:
    words = keywords(talk.prompt[:_PROMPT_READ]) or list(book.fallback_topics)
    topic = max(words[:6], key=len)
    others = [word for word in words if word != topic] or [book.fallback_topics[1]]
    who, they = random.choice(book.who)
    quote = shorten(talk.prompt, 90)
    if book is _ENGLISH and quote[-1:].isalnum():
        quote += "."
    return {
        "quote": quote or "…",
        "topic": topic,
        "Topic": topic[:1].upper() + topic[1:],
        "other": random.choice(others),
        "who": who,
        "they": they,
        "They": they.capitalize(),
        "n": str(random.randint(3, 12)),
    }


def _tell(prompt: str, book: _PhraseBook, slots: dict[str, str], random: Random) -> str:
    beginning = prompt[:_PROMPT_READ]
    if _POEM.search(beginning):
        asked = [word for word in keywords(beginning) if not _POEM.search(word)]
        topic = asked[-1] if asked else book.fallback_topics[1]
        return random.choice(book.poems).format(topic=topic, Topic=topic[:1].upper() + topic[1:])
    if _QUESTION.search(beginning):
        return _story(book, slots, random)
    characters = sum(not char.isspace() for char in prompt)
    words = prompt.split()
    tally = book.tally.format(
        words=_plural(len(words), "word"),
        letters=f"{characters}个字" if book is _CHINESE else _plural(characters, "character"),
        longest=shorten(max(keywords(beginning) or words or ["…"], key=len), 30),
    )
    remark = random.choice(book.remarks).format(**slots)
    joint = "" if book is _CHINESE else " "
    return joint.join((remark, tally, random.choice(book.invitations)))


def _story(book: _PhraseBook, slots: dict[str, str], random: Random) -> str:
    first = (book.openings, book.attempts, book.turns)
    joint = "" if book is _CHINESE else " "
    beginning = joint.join(random.choice(sentences) for sentences in first)
    return f"{beginning}\n\n{random.choice(book.endings)}".format(**slots)


def _play_along(prompt: str, book: _PhraseBook) -> str | None:
    """The prompts that have a right answer: greeting, counting, sums, letters, echo."""
    if _GREETING.fullmatch(prompt):
        return book.greeting
    if match := _ECHO.match(prompt):
        wanted = match["text"] or match["han"]
        text = re.sub(r" in (?:\w+ ){1,2}(?:words?|sentences?)\b.*", "", wanted, flags=re.DOTALL)
        text = text.strip(" \"'“”")
        return text if match["only"] else book.echo.format(text=text)
    if match := _COUNT[0].search(prompt) or _COUNT[1].search(prompt):
        first, last = _number(match[1] or "1"), _number(match[2])
        if first is not None and last is not None:
            return _count(first, last, book)
    if match := _SUM.search(prompt):
        return _calculate(int(match[1]), match[2], int(match[3]), book)
    if match := _LETTERS.search(prompt):
        return _count_letters((match[1] or match[3]).lower(), match[2] or match[4], book)
    return None


def _number(word: str) -> int | None:
    if word.isdecimal() and len(word) < 10:
        return int(word)
    if re.fullmatch("[零一二两三四五六七八九十百]+", word):
        total = digit = 0
        for char in word:
            if char in "十百":
                total += (digit or 1) * (10 if char == "十" else 100)
                digit = 0
            else:
                digit = _HAN_DIGITS[char]
        return total + digit
    return _NUMBER_WORDS.get(word.lower())


def _count(first: int, last: int, book: _PhraseBook) -> str:
    step = 1 if last >= first else -1
    numbers = range(first, last + step, step)
    shown = [str(number) for number in numbers[:_MOST_NUMBERS_COUNTED]]
    if len(numbers) > 7:
        middle = min(len(numbers), len(shown)) // 2
        shown[middle] = f"{shown[middle]} {book.half_way}"
    if len(numbers) > len(shown):
        shown.append(book.too_far.format(last=last))
    return book.count.format(numbers=", ".join(shown), n=min(len(numbers), _MOST_NUMBERS_COUNTED))


def _calculate(left: int, sign: str, right: int, book: _PhraseBook) -> str | None:
    if sign in ("+", "plus", "加"):
        sign, value = "+", str(left + right)
    elif sign in ("-", "−", "minus", "减"):
        sign, value = "−", str(left - right)
    elif sign in ("*", "×", "x", "times", "乘", "乘以"):
        sign, value = "×", str(left * right)
    elif right == 0:
        return None
    else:
        sign, value = "÷", str(left // right) if left % right == 0 else f"{left / right:.6g}"
    return book.sum.format(left=left, sign=sign, right=right, value=value)


def _count_letters(letter: str, word: str, book: _PhraseBook) -> str:
    word = word[:40]
    count = word.lower().count(letter)
    times = {0: "zero times", 1: "once", 2: "twice"}.get(count, f"{count} times")
    return book.letters.format(
        letter=letter,
        word=word,
        count=f"{count}个" if book is _CHINESE else times,
        spelt="-".join(f"[{char}]" if char.lower() == letter else char for char in word),
    )


def _use_results(talk: Talk, book: _PhraseBook, slots: dict[str, str], random: Random) -> str:
    lines = [book.result.format(tool=name, facts=_facts(text, book)) for name, text in talk.results]
    ending = random.choice(book.result_endings).format(**slots)
    return ("" if book is _CHINESE else " ").join((*lines, ending))


def _facts(text: str, book: _PhraseBook) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not value:
        return shorten(text, 300).rstrip(".。") or "…"
    verb, joint = ("是", "，") if book is _CHINESE else (" is ", ", ")
    return joint.join(
        f"{shorten(key, 40).replace('_', ' ')}{verb}"
        + shorten(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False), 120)
        for key, item in list(value.items())[:8]
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
