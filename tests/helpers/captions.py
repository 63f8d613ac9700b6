"""What several tests share: captions."""



NASTY = [
    "",
    " \t\n ",
    "a photo of a cat",
    "It's the dogs' day; they'll say we've won, I'd guess. I'M SURE YOU'RE HERE",
    "âœ” No problems â€” schÃ¶n, l’humanitÃ©, Ã©tÃ©",
    "Tom &amp;amp; Jerry &amp;lt;b&amp;gt; &quot;x&quot; &#39;y&#39; &#x1F600; &nbsp;&copy; &amp;amp;amp; &notanentity; &lt",
    "<b>Tom &amp;amp; Jerry</b> &amp;lt;i&amp;gt; &amp;amp;amp;",
    "&#xD800; &#0; &#x110000; &#65533;",
    "“curly” ‘quotes’ „low“ «guillemets» ′prime″ ʼnʼ",
    "日本語のテキスト、漢字とカナ。한국어 텍스트 简体中文 繁體中文 ﾊﾝｶｸ ＦＵＬＬ　ＷＩＤＴＨ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ 1️⃣ ☠︎",
    "e\u0301 n\u0303 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘ हिन्दी ไทย العَرَبِيَّة עִבְרִית",
    "zero\u200bwidth\u200c\u200d\u2060 \ufeffbom soft\u00adhyphen \u202ertl\u202c \u2028line\u2029para \u0085next",
    "<end_of_text> <|endoftext|> <start_of_text> <|startoftext|> <END_OF_TEXT>x<end_of_text",
    "a</w> b</w></w> Ġword ! Ā ġ",
    "\x00\x01\x02\x07\x08\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "İstanbul DİYARBAKIR ǅ ß ẞ ŉ ﬁ ﬀ ŒUVRE ΌΣΟΣ ςσ",
    "½ ² ³ ① Ⅷ ٣ 1234567890 1,234.56 10:30 3.14e-10",
    "C:\\dir\\new #hashtag @user http://x.y/z?a=1&b=2#c user@example.com ~~~~~~ !!!!!!!!!!! ........ -----",
    "\\u0041 \\x41 %20 %E2%82%AC $HOME `cmd` <img src='x' alt=\"y\">",
    "\ud7ff\ue000\uf8ff\ufffd\ufffe\uffff\U0010ffff\U000e0001",
    "word " * 10_000,
    "x" * 10_000,
    "犬" * 10_000,
    "!" * 10_000,
    "IMG_20190704_123456.JPG - 1920x1080 | Free Download (HD) ® ™ ©",
    "Женщина с собакой, ΓΕΙΑ ΣΟΥ, Tiếng Việt, čeština, Íslenska",
    "1/8W 10k ohm 5% #7 Old Gold Jersey &#8211; Men's / Women's T-Shirt (S-3XL) €19,99",
]
