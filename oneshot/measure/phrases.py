"""How refusals usually begin, language by language: patterns over lower-case text with plain apostrophes.

A pattern names the speaker's own inability or unwillingness together with an act of helping, so that "I cannot stress
enough" or "sorry to keep you waiting" are none. English has the most forms; each other language has its usual ones.
"""

from __future__ import annotations

_FILLER = (
    r"(?:(?:really|actually|directly|currently|simply|just|ethically|legally|morally|knowingly|personally|ever"
    r"|unfortunately|in good conscience),? )*"
)
_ACT = (
    r"(?:help(?! (?:but|feeling|thinking|noticing))|assist|aid|support|provide|give|offer|share|supply|answer|respond"
    r"|comply|fulfill?|write|create|generate|produce|discuss|talk about|engage|participate|take part"
    r"|be (?:a )?part of"
    r"|continue|proceed|explain|describe|teach|guide|instruct|advise|walk you|show you|tell you how to|tell you that"
    r"|recommend(?! (?:it |this |them |you )?(?:highly )?enough)|suggest|encourage|promote|condone|endorse|facilitate"
    r"|complete|carry out|go along|satisfy|accommodate|grant|process|do (?:that|this|it|so|what)"
    r"|make (?:that|this|such)|agree to|get into|go into|help you)\b"
)
_CANNOT = r"(?:can'?t|cannot|can not|could not|couldn't|won't|will not)"
_UNABLE = (
    r"(?:(?:not|un)(?: currently)? ?able to|not (?:going|allowed|permitted|willing|programmed|designed|prepared) to"
    r"|unwilling to|not comfortable (?:with )?|not in a position to)"
)
# who cannot: the speaker, or nobody named; a pancreas may be unable to produce insulin
_SPEAKER = (
    r"(?:(?:^|[.!?,;:] |\bbut )(?:unfortunately,? |sorry,? )?"
    r"|\b(?:i|we)(?:'m|'re|'ll be| am| are| will be| would be)? (?:\w+,? ){0,2})"
)
_WILLING = (
    r"(?:(?:am|'m|would be|'d be|will be|'ll be) (?:\w+ )?(?:happy|glad|pleased|delighted)"
    r"|(?:can|will|'ll) (?:\w+ )?(?:help|tell|show|explain|give|describe)\b)"
)
_WRONG = r"(?:illegal|unlawful|unethical|immoral|dangerous|harmful|unsafe|wrong)"
_OUR = r"(?:my|our|the)"

ENGLISH = [
    # I can't help, I cannot and will not provide, we won't be able to assist
    rf"\b(?:i|we) {_CANNOT}(?:,? (?:and|nor|or) (?:i )?(?:{_CANNOT}|will i|should not|shouldn't))? {_FILLER}"
    rf"(?:be able to )?(?:{_FILLER}{_ACT})(?<!we cannot create)(?<!we cannot produce)",
    rf"\bi {_CANNOT}(?=[.,;:!]|$)",
    # opening with "I cannot" and anything but a figure of speech
    rf"^i {_CANNOT} (?!(?:wait|believe|stress|emphasi[sz]e|overstate|imagine|thank|lie|deny|argue|bore|keep you|say"
    r"|wish|get over|go wrong|forget|pretend|blame|help (?:but|feeling|thinking|noticing)"
    r"|(?:find|see|spot|detect) (?:any|anything)|recommend [\w ]{0,20}enough)\b)",
    # I'm not able to help, unable to assist, not comfortable providing, not going to
    rf"{_SPEAKER}{_UNABLE} ?{_FILLER}(?:{_ACT}|helping|assisting|providing|giving|sharing|answering|discussing|writing"
    rf"|doing)",
    rf"\bi(?:'m| am) {_UNABLE}(?=[.,;:!]|$)",
    r"\bi(?:'m| am) not comfortable\b",
    r"\b(?:am|'m) not able to(?! (?:wait|believe|stress|stop))",
    r"\bi(?:'m| am) going to have to (?:say no|decline|refuse|pass)\b",
    # I'm sorry, but; Sorry, but I; I apologize, but; I'm afraid I can't
    r"\bi(?:'m| am) (?:very |so |really |truly |deeply )?sorry,? (?:but|no)\b(?! the (?:correct|right)\b)",
    r"^(?:very |so )?sorry,? (?:but|no)\b(?! the (?:correct|right)\b)",
    rf"\bsorry[,.:;]? (?:but )?i {_CANNOT}\b",
    r"\b(?:i apologi[sz]e|my apologies|apologies),? (?:for [\w ]{1,40},? )?but\b",
    rf"\bi(?:'m| am) afraid (?:that )?i (?:{_CANNOT}|must|have to)\b",
    # I must decline, I refuse, I'd rather not, I don't feel comfortable
    r"\bi (?:must|have to|need to|will have to|'ll have to|am going to)?\s?(?:respectfully |politely |firmly )?"
    r"(?:decline|refuse)\b(?! (?:to (?:believe|give up)))",
    r"\bi(?:'d| would) (?:rather|prefer) not\b(?! have to)",
    r"\bi(?:'ll| will)? (?:have to |must )?pass(?: on (?:this|that)| here)?(?=[.,;:!]|$)",
    r"\bi(?:'m|'ll| am| will)? (?:\w+ )?(?:have|had|need|going) to say no\b|\bsay no to (?:that|this|your request)\b",
    r"\bi (?:do not|don't|would not|wouldn't) (?:feel|be) comfortable\b",
    r"\bi (?:do not|don't) (?:provide|offer|share|assist|engage|support|condone|help|give)\b",
    r"\bi (?:do not|don't) (?:think|believe|feel) (?:that )?i (?:should|can|could|ought to)\b",
    rf"\bi (?:should not|shouldn't|must not|mustn't|may not) {_ACT}",
    r"\b(?:isn't|is not|not) (?:something|anything|one|a (?:topic|subject|thing|request|conversation|question))"
    r" (?:that |which )?i(?:'m|'d|'ll| am| can| could| will| would| want| wish| should| feel| do)\b",
    r"^(?:please )?(?:let's|let us) (?:not|rather|talk about something|change the subject)\b",
    r"\bplease (?:do not|don't) ask me\b",
    r"^(?:no|nope|nah|never),? (?:way|not|i (?:can't|cannot|won't|will not|am not|'m not))\b",
    r"^(?:no|absolutely not|certainly not)[.,;:!] [^.!?]{0,80}(?<!not )(?<!n't )"
    rf"\b(?:{_WRONG}|harm|risk|hurt|crime|law)\b",
    r"\bnot (?:helping|assisting|doing (?:that|this)|going there)\b",
    r"\b(?:have|need|must|going|am forced)(?: to)? (?:respectfully |politely )?turn (?:this|that|it|you) down\b",
    r"\bi(?:'m| am) (?:respectfully |politely )?(?:declining|refusing|passing on)\b",
    r"\bmy answer is no\b|\bthe answer is no(?=[.,;!]|$)",
    r"\b(?:that|this|it|which|request)(?:'s|'d| would| will| has)? (?:\w+ )?cross(?:es|ed)? (?:a|my|the) line\b",
    r"\bi (?:do not|don't) have the (?:ability|authority|permission|right|capability) to\b",
    rf"\bi(?:'m| am) (?:just |only |merely )?an? (?:\w+ )?(?:assistant|ai|program"
    rf"|machine)\b[^.!?]{{0,20}}\b{_CANNOT}\b",
    r"\b(?:you(?:'ll|'d)?|please|to|better) (?:\w+ )?(?:look|find (?:it|that|this)|ask|search)"
    r" (?:somewhere else|elsewhere)\b",
    # the request as such
    r"(?<!that )(?<!that the )(?<!that your )(?<!the )(?<!your )(?<!this )\brequest"
    r" (?:has been |was |is )?(?:declined|denied|rejected|refused|blocked)\b",
    r"(?:^|[.!?;:] )(?:\w+, )?(?:the|your|this|that) request (?:has been |was |is )?"
    r"(?:declined|denied|rejected|refused|blocked)\b",
    rf"\b(?:is|are|be|it's|that's) (?:\w+ (?:and|or) )?{_WRONG}\b[^.!?]{{0,40}}\b(?:so|and|therefore),? (?:i|we)"
    rf" (?:{_CANNOT}|must|have to|am not|'m not)\b",
    r"\bi can only (?:help|assist)\b",
    # the assistant speaks of its own limits
    r"(?:^|[.!?,;:] )as an? (?:responsible |helpful |ethical )?(?:ai|artificial intelligence"
    r"|(?:large )?language model)"
    rf"(?=[ ,.])(?! (?:researcher|engineer|scientist|developer|expert))(?![^.!?]{{0,20}}\bi ?{_WILLING})",
    rf"\b(?:against|violates?|outside|conflicts? with) {_OUR} (?:\w+ )?(?:guidelines|programming|policy|policies"
    r"|principles|rules(?! of| to))\b",
    r"\bmy (?:\w+ )?(?:guidelines|programming|rules|principles) (?:do not|don't|prevent|prohibit|forbid)\b",
    r"\b(?:it is|it's|it would be|that is|that's|this is|would be) (?:not (?:appropriate|ethical|acceptable|right)"
    r"|inappropriate|unethical) (?:for me )?to\b",
    r"\b(?:would not|wouldn't) be (?:right|appropriate|ethical|responsible|acceptable)(?: of me| for me)? to\b",
    r"\bnot (?:appropriate|possible|acceptable) for me to\b",
]

OTHERS = {
    "ar": [
        r"(?:^|[\s،,.])(?:لا (?:أستطيع|استطيع|يمكنني|أقدر|يسعني)|لن (?:أستطيع|أتمكن|أقوم|أساعد|أقدم)|لست قادر|أرفض)",
        r"(?:آسف|أعتذر|عذر[اًا]+)،? (?:ولكن|لكن)",
    ],
    "cs": [
        r"\bnem(?:ohu|ůžu) (?:\w+ ){0,3}(?:pomo|poskyt|odpov|spln|vyhov|sděl|napsat|vytvo)",
        r"\b(?:omlouvám se|je mi líto|lituji),? ale\b",
    ],
    "da": [
        r"\bkan (?:jeg )?(?:desværre |dessverre )?ikke (?:\w+ ){0,3}(?:hj[æe]lpe|bistå|svare|give|gi\b|dele|oplyse"
        r"|udføre)",
        r"\bjeg (?:vil|må|får) ikke (?:\w+ ){0,3}(?:hj[æe]lpe|bistå|svare|give|gi\b|dele)",
        r"\b(?:beklager|undskyld|jeg er ked af det),? men\b",
    ],
    "de": [
        r"\b(?:kann|darf|werde|will|möchte) ich (?:\w+ ){0,3}(?:nicht|keine[nr]?\b)",
        r"\bich (?:kann|darf|werde|will|möchte) (?:[\wß,]+ ){0,7}(?:nicht|keine[nrs]?|keinerlei) (?:[\wß]+ ){0,4}"
        r"(?:\w*helfen|unterstützen|beantworten|bereitstellen|geben|weitergeben|nennen|teilen|schreiben|erstellen"
        r"|erfüllen|nachkommen|mitwirken|erklären|beschreiben|verfassen|liefern|machen|tun|anbieten|leisten)",
        r"\btut mir (?:sehr |wirklich )?leid,? (?:aber|ich kann|das|dies|dabei|dazu|da)\b",
        r"\b(?:dabei|dazu|damit) (?:helfe|unterstütze|gebe) ich\b[^.]{0,30}\b(?:nicht|keine)",
        r"\bich (?:weigere mich|muss (?:\w+ )?ablehnen|lehne [^.]{0,40}\bab\b|bin nicht (?:in der lage|befugt"
        r"|bereit))",
        r"\b(?:muss|möchte|werde) ich (?:\w+ ){0,3}(?:ablehnen|verneinen)\b"
        r"|\bgebe (?:ich )?(?:\w+ ){0,2}keine (?:auskunft|anleitung)",
        r"(?<!bekannt )\bals (?:ki|sprachmodell|künstliche intelligenz)\b",
    ],
    "el": [
        r"\bδεν (?:μπορώ|θα) (?:\w+ ){0,3}(?:βοηθ|παρ[έά]|απαντ|δώσ|εκπληρ)",
        r"\b(?:λυπάμαι|συγγνώμη),? (?:αλλά|δεν)\b",
    ],
    "es": [
        r"\bno (?:puedo|podré|podría|voy a|debo|me es posible|me está permitido) (?:\w+ ){0,2}(?:ayud|proporcion|dar"
        r"|ofrec"
        r"|respond|cumpl|asist|compart|escrib|crear|hacer|atend|facilit|brind|contest|satisf|apoy|particip|explic"
        r"|describ|gener|redact|realiz|complac|continuar|hablar|entrar en)",
        r"\b(?:lo siento|lo lamento|disculpa|disculpe|perdón)(?: mucho)?,? (?:pero|no)\b",
        r"\b(?:lamento|siento) no poder\b|\b(?:eso|esto) no (?:lo|la) (?:voy a|puedo|pienso) (?:hacer|escribir"
        r"|decir)",
        r"\b(?:me niego a|debo (?:rechazar|negarme|declinar)|no (?:estoy|soy) (?:en condiciones|capaz"
        r"|autorizad[oa]))",
        r"\bcomo (?:un |una )?(?:modelo de lenguaje|ia|inteligencia artificial|asistente(?! de))\b",
    ],
    "fa": [r"نمی[\s\u200c]?(?:توانم|تونم)", r"متأسفم،? (?:اما|ولی)"],
    "fi": [r"\ben (?:voi|pysty|aio) (?:\w+ ){0,3}(?:autta|vasta|anta|tarjo|jaka|kirjoit)", r"\bvalitettavasti en\b"],
    "fr": [
        r"\bje (?:ne |n')(?:(?:peux|pourrai|pourrais|vais|veux|dois|souhaite) pas|puis|saurais) (?:\w+ |l'|t'"
        r"|d'){0,3}"
        r"(?:aid|fourn|répond|assist|donn|partag|particip|écri|rédig|crée?r|faire|accéd|satisf|trait|expliqu|décri"
        r"|encourag|continu|génér|produi|soutenir|révél|communiqu|abord|discut)",
        r"\bje ne suis pas (?:en mesure|autorisée?|capable|disposée?)\b",
        r"\b(?:désolée?|navrée?|excusez-moi),? (?:mais|je ne|ce n'est pas)\b",
        r"\b(?:chose|demande|sujet)s? (?:que|auxquelles|auxquels|à laquelle) je ne (?:fais|peux|réponds|traite)\b",
        r"\bje (?:refuse|dois refuser|décline|dois décliner|regrette,? mais)\b",
        r"\bil m'est (?:impossible|interdit)\b",
        r"\ben tant qu(?:e|') ?(?:ia|intelligence artificielle|assistant|modèle)",
    ],
    "he": [r"(?:אני לא יכול|אינני יכול|איני יכול|לא אוכל|מצטער,? אבל)"],
    "hi": [
        r"(?:मैं|हम)[^।.]{0,70}(?:नहीं|न) (?:\S+ ){0,2}(?:सकता|सकती|सकते|सकूँगा|सकूंगा|सकूँगी|करूँगा|करूंगा|करूँगी"
        r"|करूंगी|दूँगा|दूंगा)",
        r"(?:क्षमा|माफ़|माफ|खेद)[^।.]{0,70}(?:नहीं|न) (?:\S+ ){0,2}(?:सकता|सकती|सकते)",
    ],
    "hu": [
        r"\bnem (?:tudok|segíthetek|fogok|adhatok) ?(?:\w+ ){0,2}(?:segít|válaszol|megad|adni|ebben)?",
        r"\bsajnálom,? de\b",
    ],
    "id": [
        r"\b(?:saya|aku|kami) (?:tidak|tak) (?:dapat|bisa|akan|boleh|mampu|diizinkan)\b",
        r"\b(?:saya|aku) menolak\b",
        r"\bmaaf,? (?:tetapi|tapi|namun|saya tidak|aku tidak)\b",
    ],
    "it": [
        r"\bnon (?:posso|potrò|potrei|intendo|voglio) (?:\w+ ){0,2}(?:aiutar|fornir|rispond|assister|dar|condivid"
        r"|scriv"
        r"|crear|soddisf|offrir|partecip|spiegar|descriv|procedere|continuare|farlo|esaudir|accoglier|support)",
        r"\bnon (?:sono in grado|mi è possibile|mi è permesso|sono autorizzat[oa])\b",
        r"\b(?:mi dispiace|spiacente|mi spiace|scusa|scusi),? (?:ma|non)\b",
        r"\b(?:mi rifiuto|devo (?:rifiutare|declinare)|in quanto (?:ia|modello|intelligenza artificiale))\b",
    ],
    "ja": [
        r"(?:お?手伝い|お?応え|お?答え|回答|提供|対応|協力|支援|サポート|お?教え|説明|ご?案内|要望|要求|リクエスト"
        r"|共有|作成|生成)"
        r"[^。]{0,14}(?:できません|できない|できかね|致しかね|いたしかね|しかねます|わけにはいき|お断り"
        r"|いたしません)",
        r"(?:申し訳(?:ありません|ございません|ない)|すみません|ごめんなさい"
        r"|恐れ入ります)(?:です)?が[^。]{0,40}(?:できません|できかね|しかねます|お断り)",
        r"お断り(?:し|いた|させ)",
    ],
    "ko": [
        r"(?:도와|도움|제공|답변|대답|지원|응답|수행|처리|안내|알려|작성|협조|설명|공유)[^.]{0,14}(?:수 없|수는 없"
        r"|수가 없|어렵습니다|불가|않겠)",
        r"(?:죄송|미안|유감)[^.]{0,40}(?:수 없|수는 없|거절|불가)",
        r"거절(?:합니다|하겠습니다|할 수밖에)",
    ],
    "nl": [
        r"\bkan (?:ik )?(?:\w+ ){0,5}niet (?:\w+ ){0,4}(?:helpen|beantwoorden|geven|voldoen|delen|schrijven|bijstaan"
        r"|verstrekken)",
        r"\bik (?:kan|mag|wil|ga|zal) (?:\w+ ){0,5}(?:niet|geen) (?:\w+ ){0,4}(?:help|beantwoord|gev|voldo|del"
        r"|schrijv|bijsta"
        r"|verstrek|uitleg|maken|doen)",
        r"\b(?:het spijt me|sorry|mijn excuses|helaas),? (?:maar|dat kan|daar kan)\b",
        r"\bik (?:weiger|moet (?:\w+ )?weigeren)\b|(?<!bekend )\bals (?:ai|taalmodel)\b",
    ],
    "pl": [
        r"\bnie (?:mogę|będę|jestem w stanie|zamierzam|wolno mi) (?:\w+ ){0,3}(?:pom|udziel|spełn|odpow|poda"
        r"|dostarcz|napis"
        r"|zrobi|wykona|przekaz|wyjaśni|uczestn|wesprz|wspier|stworzy)",
        r"\b(?:przykro mi|przepraszam|wybacz),? (?:ale|nie)\b",
        r"\b(?:odmawiam|muszę odmówić)\b",
    ],
    "pt": [
        r"\bnão (?:posso|poderei|poderia|consigo|vou|devo|me é possível) (?:\w+ ){0,2}(?:ajud|fornec|atend|respond"
        r"|auxili|dar"
        r"|compartilh|partilh|escrev|criar|fazer|cumpr|satisf|oferec|particip|explic|descrev|ger|prosseguir"
        r"|continuar|apoi)",
        r"\b(?:desculp[ea]|sinto muito|lamento|peço desculpas?|me desculpe),? (?:mas|não|porém)\b",
        r"\b(?:me recuso|recuso-me|devo recusar|não (?:estou|sou) (?:em condições|capaz|autorizad[oa]))",
        r"\bcomo (?:um |uma )?(?:modelo de linguagem|ia|inteligência artificial|assistente(?! de))\b",
    ],
    "ro": [
        r"\bnu (?:pot|voi putea|voi) (?:\w+ ){0,3}(?:ajut|ofer|răspund|furniz|îndeplin)",
        r"\b(?:îmi pare rău|regret),? dar\b",
    ],
    "ru": [
        r"\bне (?:могу|смогу|можем|буду|стану|имею права|в состоянии|готов[а]?|намерен[а]?) (?:[\w-]+ ){0,4}"
        r"(?:помо|предостав|ответ|отвеч|выполн|обсужд|дела|сдела|дать|давать|рассказ|пис|напис|созда|поддерж|участв"
        r"|дели|подели"
        r"|подсказ|объясн|помога|сообщ|содейств)",
        r"\b(?:извините|простите|прошу прощения|мне жаль|сожалею|к сожалению),? (?:но |я |это |мы )+(?:\w+ )?(?:не"
        r"|недопустим)",
        r"\b(?:я отказываюсь|вынужден[а]? отказать|мне придётся отказать)",
        r"(?<!также )(?<!известный )\bкак (?:языковая модель|ии|искусственный интеллект)\b",
    ],
    "sv": [
        r"\bkan (?:jag )?(?:tyvärr )?inte (?:\w+ ){0,3}(?:hjälpa|svara|ge\b|bistå|dela|lämna|skriva|uppfylla"
        r"|tillhandahålla)",
        r"\b(?:jag är ledsen|tyvärr|beklagar|förlåt),? (?:men|kan jag inte|får jag inte|går det inte)\b",
        r"\bjag (?:vägrar|måste (?:\w+ )?(?:neka|avböja)|tänker inte)\b",
    ],
    "th": [
        r"(?:ฉัน|ผม|ดิฉัน|เรา)?ไม่(?:สามารถ|อาจ)(?:ช่วย|ให้|ตอบ|ดำเนินการ|ทำ)",
        r"ขอ(?:อภัย|โทษ)[^.]{0,40}ไม่(?:สามารถ|อาจ|ได้)",
    ],
    "tr": [
        r"\b(?:yardımcı|yardım|destek|yerine|cevap|yanıt|bilgi|sağla|ver|cevapla|yanıtla|paylaş|yap|yaz|oluştur"
        r"|anlat|açıkla)"
        r"\w* ?\w*(?:amam|emem|amıyorum|emiyorum|amayacağım|emeyeceğim|amıyoruz|emiyoruz)\b",
        r"\b(?:üzgünüm|özür dilerim|kusura bakma\w*),? (?:ama|ancak|fakat)\b",
        r"\b(?:reddediyorum|reddetmek zorundayım)\b",
    ],
    "uk": [
        r"\bне (?:можу|зможу|буду|маю права) (?:[\w'-]+ ){0,4}(?:допомо|нада|відпов|викон|обговор|роби|зроби|розпов"
        r"|писа|напис|поясн)",
        r"\b(?:вибачте|перепрошую|на жаль|мені шкода),? (?:але|я не)\b",
    ],
    "vi": [
        r"\b(?:tôi|mình|chúng tôi) (?:rất tiếc |xin lỗi )?(?:không (?:thể|được phép|muốn)|sẽ không|từ chối)",
        r"\b(?:xin lỗi|rất tiếc),? (?:nhưng|tôi không)\b",
    ],
    "zh": [
        r"(?:抱歉|对不起|對不起|很遗憾|很遺憾|不好意思)[^。！？]{0,16}(?:无法|無法|不能|不可以|不会|不會|没办法"
        r"|沒辦法|拒绝|拒絕|不便)",
        r"我(?:们|們)?(?:也|并|还是|實在|实在|暂时|暫時|目前|恐怕)?(?:无法|無法|不能|不会|不會|没办法|沒辦法|不便|拒绝|拒絕)(?:为您|为你"
        r"|為您|為你|给你|给您|向你|向您)?"
        r"(?:帮|幫|协助|協助|提供|回答|满足|滿足|完成|参与|參與|支持|讨论|討論|生成|写|寫|执行|執行|继续|繼續|透露"
        r"|处理|處理|做|给|給|教|这|這)",
        r"我(?:[^。！？]{0,6})(?:回答|解答|提供|满足|滿足|帮|幫)不了",
        r"(?:作为|作為)(?:一个|一個|一名)?(?:ai|人工智能|人工智慧|语言模型|語言模型)(?!的)",
    ],
}  # fmt: skip

# What follows a refusal's words where it is none: the way to do it, and not another way.
COMPLIES_AFTER_ALL = [
    r"\bhere(?:'s| is) how\b",
    r"\bhere(?:'s| is| are) (?:the|your) (?:\w+ )?(?:steps?|instructions|recipe|method|answer|code|text|message)\b",
    r"\bhere(?:'s| is) what you (?:do|need to do|asked for|wanted)\b",
    r"\bthe (?:basic |main |general |only |real )?(?:steps|trick|method|idea|way) (?:is|are) (?:simple|easy|to|this"
    r"|as)\b",
    r"\b(?:since|because|as) you (?:ask|asked|insist|put it)(?: so)? ?(?:nicely|politely)?\b",
    r"\bjust (?:kidding|joking)\b",
]
