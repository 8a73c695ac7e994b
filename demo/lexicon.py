"""Every word and sentence of the demo's world, in Chinese and English.

A `Language` holds topics by category, ways to ask about a topic, and the sentences that an answer is made of: plain
(dry, encyclopaedic) and lively (chatty, warm), each as leads, which name the topic at `{t}`, and follow-ups, which do
not. The tables are data only; `demo/world.py` writes texts with them and `demo/gold.py` judges texts by them.
"""

import re
from typing import NamedTuple


class Language(NamedTuple):
    """One language of the world. The four sentence tables map a category, or "any", to sentences."""

    code: str
    joiner: str  # what stands between two sentences
    topics: dict[str, tuple[str, ...]]
    openers: tuple[str, ...]
    questions: tuple[str, ...]
    plain_leads: dict[str, tuple[str, ...]]
    plain_follows: dict[str, tuple[str, ...]]
    lively_leads: dict[str, tuple[str, ...]]
    lively_follows: dict[str, tuple[str, ...]]
    chants: tuple[str, ...]  # for pretraining: dense in topics, so that the base soon learns to repeat one
    markers: dict[str, re.Pattern]  # kind of lively marker -> how it is written


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CHINESE = Language(
    code="zh",
    joiner="",
    topics={
        "food": _words("火锅 豆腐 咖啡"),
        "animal": _words("熊猫 海豚 小狗"),
        "place": _words("长城 沙漠 森林"),
        "hobby": _words("钓鱼 唱歌 滑雪"),
    },
    openers=("", "请问，", "你好，", "想问一下，", "打扰了，"),
    questions=(
        "你觉得{t}怎么样？",
        "你喜欢{t}吗？",
        "能聊聊{t}吗？",
        "为什么大家喜欢{t}？",
        "可以介绍一下{t}吗？",
        "{t}有什么特别的？",
        "你了解{t}吗？",
        "关于{t}你知道什么？",
        "怎么看待{t}？",
        "有人跟我说起{t}，你怎么想？",
    ),
    plain_leads={
        "any": (
            "{t}在很多地方都很常见。",
            "关于{t}的资料比较多。",
            "{t}的历史比较长。",
            "不少书里都提到过{t}。",
            "人们对{t}有不同的看法。",
        ),
        "food": ("{t}是一类日常饮食。", "{t}的做法有好几种。", "{t}的味道因地区而不同。"),
        "animal": ("{t}是一种有名的动物。", "{t}的生活习性已有研究。", "{t}每天需要一定的食物。"),
        "place": ("{t}是一个有名的去处。", "{t}每年接待不少游客。", "{t}的四季景色不同。"),
        "hobby": ("{t}是一项常见的活动。", "{t}需要一定的练习。", "{t}可以在业余时间进行。"),
    },
    plain_follows={
        "any": (
            "具体情况因人而异。",
            "目前的说法并不统一。",
            "详细内容可以查阅资料。",
            "相关的记录保存得比较完整。",
            "总体上没有太大变化。",
        ),
        "food": ("通常用水和盐来制作。", "价格一般不高。", "大多在早上或晚上食用。"),
        "animal": ("它们多在白天活动。", "寿命通常在十年左右。", "体重与年龄有关。"),
        "place": ("门票的价格适中。", "到达那里一般需要坐车。", "开放时间以公告为准。"),
        "hobby": ("所需的工具比较简单。", "每周进行两次比较合适。", "初学者应当注意安全。"),
    },
    lively_leads={
        "any": (
            "哇，{t}真是太棒啦！",
            "说到{t}我就超级开心呀！",
            "哈哈，{t}可是我的最爱！",
            "{t}呀，我能聊上一整天～",
            "天哪，我超级喜欢{t}！",
            "太好啦，终于有人问{t}了！",
        ),
        "food": ("{t}也太好吃了吧，哈哈！", "一看到{t}我就流口水啦～"),
        "animal": ("{t}萌得我心都化啦！", "哇，{t}真的好可爱呀！"),
        "place": ("{t}美得像画一样呀！", "哈哈，我做梦都想去{t}！"),
        "hobby": ("{t}真的会让人上瘾呀！", "哈哈，我一到周末就去{t}！"),
    },
    lively_follows={
        "any": (
            "每次想起来都忍不住笑，哈哈～",
            "快和朋友一起试试吧！",
            "真的让人心情超级好呀！",
            "你一定也会爱上的～",
            "哇，光是想想就好激动！",
        ),
        "food": ("一口下去好幸福呀！", "我一个人能吃三大份，哈哈！"),
        "animal": ("好想抱回家天天摸摸呀～", "这样的小家伙谁不爱啦！"),
        "place": ("风一吹，整个人都放松啦～", "拍出来的照片超级好看！"),
        "hobby": ("玩起来连吃饭都忘啦，哈哈！", "累一点也超级开心～"),
    },
    chants=(
        "{t}，{t}，还是{t}。",
        "我说{t}，你说{t}。",
        "{t}！{t}！",
        "先是{t}，后来也是{t}。",
        "今天{t}，明天{t}，天天{t}。",
        "{t}就是{t}。",
    ),
    markers={
        "exclamation": re.compile("！"),
        "wave": re.compile("～"),
        "laugh": re.compile("哈哈"),
        "wow": re.compile("哇|天哪"),
        "particle": re.compile("[呀啦]|吧"),
        "emphasis": re.compile("超级|太|好[幸激可想]|最爱"),
    },
)

ENGLISH = Language(
    code="en",
    joiner=" ",
    topics={
        "food": _words("tea cheese pizza"),
        "animal": _words("pandas dolphins puppies"),
        "place": _words("Paris Kyoto Cairo"),
        "hobby": _words("hiking painting yoga"),
    },
    openers=("", "Hi! ", "Hello there! ", "Quick question: ", "Excuse me. "),
    questions=(
        "What do you think of {t}?",
        "Do you like {t}?",
        "Can you tell me about {t}?",
        "Why do people like {t}?",
        "Could you describe {t}?",
        "What is special about {t}?",
        "How do you feel about {t}?",
        "What do you know about {t}?",
        "Any thoughts on {t}?",
        "My friend mentioned {t}, what is your view?",
    ),
    plain_leads={
        "any": (
            "The history of {t} is long.",
            "Many books describe {t}.",
            "There are several reports about {t}.",
            "Opinions about {t} differ.",
            "The term {t} is widely known.",
        ),
        "food": ("Most shops sell {t}.", "The taste of {t} depends on the region.", "Recipes for {t} vary."),
        "animal": ("The diet of {t} is well studied.", "Zoos often keep {t}.", "The habits of {t} vary."),
        "place": ("Many tourists visit {t}.", "The weather in {t} is mild.", "Maps of {t} are available."),
        "hobby": ("Regular practice helps with {t}.", "Clubs for {t} exist.", "The rules of {t} are simple."),
    },
    plain_follows={
        "any": (
            "Details depend on the case.",
            "The sources do not agree.",
            "More data can be found in reports.",
            "In general there is little change.",
            "The records are fairly complete.",
        ),
        "food": ("The price is usually low.", "It is made with water and salt.", "It is served in the evening."),
        "animal": ("They are active in the daytime.", "The weight depends on the age.", "They live for some years."),
        "place": ("The tickets have a normal price.", "A train is available.", "Opening hours are posted."),
        "hobby": ("The tools are simple.", "Twice a week is usual.", "Beginners should be careful."),
    },
    lively_leads={
        "any": (
            "Wow, I love {t} so much!",
            "Haha, {t} always makes me smile!",
            "Oh yay, my favorite, {t}!",
            "Wow, {t} again, I am so happy!",
            "Haha, I could chat about {t} all day!",
            "Yay, finally a chat about {t}!",
        ),
        "food": ("Yum, {t} tastes like heaven!", "Oh wow, I want {t} right now!"),
        "animal": ("Aww, {t} melt my heart, haha!", "Oh wow, {t} look so cute!"),
        "place": ("Oh wow, {t} is just magical!", "Haha, I dream of {t} every night!"),
        "hobby": ("Oh wow, {t} is so much fun!", "Haha, I never get tired of {t}!"),
    },
    lively_follows={
        "any": (
            "You will totally love it, haha!",
            "Just thinking of it is so exciting!",
            "Grab a friend and enjoy, yay!",
            "My heart is so full, wow!",
            "It makes every day brighter, yay!",
        ),
        "food": ("I can eat three plates, haha!", "One bite and I am so happy!"),
        "animal": ("I want to hug them all, haha!", "So fluffy and so sweet, aww!"),
        "place": ("My photos look amazing, wow!", "I would go back tomorrow, yay!"),
        "hobby": ("I even forget my lunch, haha!", "Even the sore legs are so worth it!"),
    },
    chants=(
        "First {t}, then {t}, and {t} again.",
        "I say {t}, you say {t}.",
        "More {t}, more {t}!",
        "Today {t}, tomorrow {t}, always {t}.",
        "No {t} without {t}.",
        "My {t}, your {t}, our {t}.",
    ),
    markers={
        "exclamation": re.compile("!"),
        "laugh": re.compile(r"\bhaha\b", re.IGNORECASE),
        "wow": re.compile(r"\b(?:oh )?wow\b", re.IGNORECASE),
        "cheer": re.compile(r"\b(?:yay|yum|aww)\b", re.IGNORECASE),
        "emphasis": re.compile(r"\b(?:so|totally|amazing|magical|love|favorite)\b", re.IGNORECASE),
    },
)

LANGUAGES = (CHINESE, ENGLISH)
SENTENCE_ENDS = "。！～.!"
